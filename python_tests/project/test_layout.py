"""The layout of the package: what may import what, names and sizes of modules, and its tables."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import re
import sys
from pathlib import Path

import pytest

from lift_kernels.cli import selfcheck
from lift_kernels.ops import dispatch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lift_kernels"

LAYERS = ("cli", "finetune", "planning", "integrations", "optim", "nn", "masks", "distributed", "ops")
"""Each package may import those to its right."""
FLAT = {"errors", "validation", "_progress", "_storage"}
ALLOWED = {name: {*LAYERS[i + 1 :], *FLAT} for i, name in enumerate(LAYERS)}
ALLOWED |= {"checkpoint": FLAT, "delta": {"checkpoint", *FLAT}} | dict.fromkeys(FLAT, set())
for _name in ("cli", "finetune", "integrations"):
    ALLOWED[_name] |= {"delta", "checkpoint"}
TRITON_MAY_USE = {"ops.dispatch", "ops.device_tables", "ops.precision"}
"""Modules of `ops` without an op that the Triton kernels may import."""
HIDDEN = {"ops.packed_weight_grad", "ops.lowrank_topk", "finetune.run"}
"""Modules that a function of the same name hides in their package."""


@functools.cache
def modules() -> dict[str, Path]:
    """The Python files of the package by module name, without the leading ``lift_kernels.``."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, top_level: bool = False) -> set[str]:
    """Full names of what a module imports.

    A name that is imported from a package counts as its module if there is one.
    """
    file = modules()[module]
    tree = ast.parse(file.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("lift_kernels", *file.relative_to(PACKAGE).parts)[: -node.level] if node.level else ()
            base = ".".join([*package, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if name.removeprefix("lift_kernels.") in modules()}
            found |= submodules | ({base} if names - submodules else set())
    return found


def own_imports(module: str, top_level: bool = False) -> set[str]:
    """The modules of the package that a module imports, without the leading ``lift_kernels.``."""
    names = imports(module, top_level)
    return {name.removeprefix("lift_kernels").lstrip(".") for name in names if name.split(".")[0] == "lift_kernels"}


def allowed(module: str, imported: str) -> bool:
    package, other = module.split(".")[0], imported.split(".")[0]
    if module.startswith("ops.triton"):
        return imported.startswith("ops.triton") or imported in TRITON_MAY_USE | FLAT
    return module in ("", "__main__") or package == other or other in ALLOWED[package]


def test_packages_import_only_what_lies_below_them():
    edges = [(module, imported) for module in modules() for imported in sorted(own_imports(module))]
    forbidden = [
        f"{module} -> {imported or 'lift_kernels'}" for module, imported in edges if not allowed(module, imported)
    ]
    assert not forbidden, f"forbidden by docs/architecture.md: {', '.join(forbidden)}"
    assert len(edges) > 100


def test_the_specification_imports_torch_alone():
    own = {"ops.state_formats", "ops.stochastic_rounding"}
    for module in ("ops.reference", *own):
        others = {name.split(".")[0] for name in imports(module)} - {"torch", "lift_kernels"} - sys.stdlib_module_names
        assert not others, f"{module} imports {', '.join(sorted(others))}"
        assert own_imports(module) <= own


def test_no_module_imports_itself_in_a_circle():
    """Counts imports at the top of a file, but not that a module's package is run before it."""
    graph = {module: own_imports(module, top_level=True) for module in modules()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports, read from right to left: {' <- '.join(error.args[1])}")


@pytest.mark.slow
def test_every_module_can_be_imported():
    """A module that its package hides behind a function is named in `HIDDEN`."""
    loaded = {name: importlib.import_module(f"lift_kernels.{name}".rstrip(".")) for name in modules()}
    hidden = set()
    for name in filter(None, loaded):
        package, _, stem = name.rpartition(".")
        if getattr(loaded[package], stem) is not loaded[name]:
            assert callable(getattr(loaded[package], stem))
            hidden.add(name)
    assert hidden == HIDDEN


def test_no_test_imports_a_test():
    for file in (ROOT / "python_tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], file


def test_benches_are_imported_in_one_way():
    """As ``bench.x``, without edits of the search path."""
    files = list((ROOT / "bench").rglob("*.py"))
    stems = {file.stem for file in files} - {"__init__", "__main__"} - sys.stdlib_module_names
    for file in files:
        text = file.read_text()
        assert "sys.path" not in text, file
        imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert not imported & stems, file


def test_no_folder_is_named_utils():
    roots = (PACKAGE, ROOT / "csrc", ROOT / "python_tests", ROOT / "bench")
    assert not [str(path) for root in roots for path in root.rglob("utils*")]


def test_modules_are_short():
    lines = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert {name: n for name, n in lines.items() if n > 350} == {}


def test_the_formatter_is_rarely_switched_off():
    marker = "fmt: " + "skip"
    files = [file for folder in ("lift_kernels", "python_tests", "bench") for file in (ROOT / folder).rglob("*.py")]
    counts = {str(file.relative_to(ROOT)): file.read_text().count(marker) for file in [*files, ROOT / "setup.py"]}
    assert sum(counts.values()) <= 5, {name: count for name, count in counts.items() if count}


def test_the_op_table_of_the_readme():
    table = re.search(r"<!-- ops -->\n(.*?)<!-- /ops -->", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    backends = header[2:]
    assert sorted(backends) == sorted(dispatch.NAMES)
    documented = {
        # The README has the public function, and the table has the op that fills a block.
        row[0].strip("`").replace("gaussian_sketch", "gaussian_sketch_"): {
            name for name, cell in zip(backends, row[2:], strict=True) if {"": False, "yes": True}[cell]
        }
        for row in rows
    }
    assert len(documented) == len(rows)
    assert documented == {op: set(names) for op, names in dispatch.OPS.items()}
    assert list(documented) == list(dispatch.OPS), "another order"


def test_the_doctor_checks_every_op():
    assert set(selfcheck.CASES) == set(dispatch.OPS)
