"""Which packages each test file needs, found by parsing imports."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from pathlib import Path

# These are enough for most tests marked gpu. A file that imports a further package is left out if
# the package is not installed, and pytest prints a line about it.
ENOUGH = {"torch", "triton", "numpy", "pytest", "ninja"}
ROOT = Path(__file__).parents[2]
# Folders of modules: helpers and packages.
PLACES = (ROOT / "python_tests", ROOT)


@functools.cache
def file_of(module: str) -> Path | None:
    """The file of one of the project's own modules, or None for any other module."""
    path = Path(*module.split("."))
    candidates = (place / name for place in PLACES for name in (path.with_suffix(".py"), path / "__init__.py"))
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def imports_of(file: Path) -> set[str]:
    """Full names of what a file imports at its top level.

    A name that is imported from a package also counts as a module of it, if there is one.
    """
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(file.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names if file_of(f"{base}.{alias.name}")}
    return found


def extras_of(module: str) -> set[str]:
    """The packages beyond `ENOUGH` and the standard library that a module needs.

    The needs of the project's other modules that it imports count too.
    """
    extras, seen, left = set(), set(), [module]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        file = file_of(name)
        if file is None:
            extras |= {name.partition(".")[0]} - ENOUGH - sys.stdlib_module_names
        else:
            left += imports_of(file)
            left += [name.rpartition(".")[0]] if "." in name else []  # importing a module runs its package first
    return extras


TESTS = ROOT / "python_tests"


def extras_of_file(file: str) -> set[str]:
    """The extras of a test file, given by its path within python_tests."""
    return extras_of(file.removesuffix(".py").replace("/", "."))


FILES = sorted(str(file.relative_to(TESTS)) for file in TESTS.rglob("test_*.py"))
MISSING = {
    file: sorted(name for name in extras_of_file(file) if importlib.util.find_spec(name) is None) for file in FILES
}
"""Of every test file: what it needs and what is not installed here."""
