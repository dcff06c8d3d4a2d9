"""The fixture `where`: each test of an op runs on every backend that can run here.

The suite runs twice. The plain run takes the reference and the native C++ on the CPU, and on a CUDA
device Triton and the native CUDA ops (mark ``gpu``, the only tests that may be skipped).
``TRITON_INTERPRET=1 pytest -m interpreter`` takes the Triton kernels on CPU tensors.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lift_kernels.ops import dispatch

# These are enough for the tests marked gpu. A file that imports more is left out where that is not
# installed, with a line that says so.
ENOUGH = {"torch", "triton", "numpy", "pytest", "ninja"}
ROOT = Path(__file__).parents[1]
PLACES = (
    ROOT / "python_tests",
    ROOT,
    ROOT / "bench",
)  # of modules: tests and their helpers, packages, scripts of the benches


@functools.cache
def file_of(module: str) -> Path | None:
    """The file of one of the project's own modules, None for any other module."""
    path = Path(*module.split("."))
    candidates = (place / name for place in PLACES for name in (path.with_suffix(".py"), path / "__init__.py"))
    return next((file for file in candidates if file.is_file()), None)


@functools.cache
def imports_of(file: Path) -> set[str]:
    """Full names of what a file imports at its top level; a name imported from a package counts as
    a module of it, too.
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
    """The packages beyond `ENOUGH` and the standard library that a module needs, by way of the
    project's other modules too.
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
            left += [name.rpartition(".")[0]] if "." in name else []  # the package runs first
    return extras


MISSING = {
    file.name: sorted(name for name in extras_of(file.stem) if importlib.util.find_spec(name) is None)
    for file in Path(__file__).parent.glob("test_*.py")
}
collect_ignore = [file for file, names in MISSING.items() if names]


def pytest_terminal_summary(terminalreporter):
    for file, names in MISSING.items():
        if names:
            terminalreporter.write_line(f"{file} is left out: {' and '.join(names)} not installed")


@dataclass(frozen=True)
class Where:
    """A backend, and the device whose tensors it serves."""

    backend: str
    device: str


def places(test_name: str) -> list:
    """Parameters of `where`. The native CUDA backend joins in the tests named after an op that it
    has.
    """
    if dispatch.interpreting():
        return [pytest.param(Where("triton", "cpu"), id="triton")]
    on_cuda = ["triton"]
    if any(test_name.startswith(f"test_{op.rstrip('_')}") for op in dispatch.ops_of("native-cuda")):
        on_cuda.append("native-cuda")
    return [
        pytest.param(Where("reference", "cpu"), id="reference"),
        pytest.param(Where("native-cpu", "cpu"), id="native-cpu", marks=pytest.mark.native),
        *(pytest.param(Where(name, "cuda"), id=f"{name}-on-gpu", marks=pytest.mark.gpu) for name in on_cuda),
    ]


def pytest_generate_tests(metafunc):
    if "where" in metafunc.fixturenames:
        metafunc.parametrize("where", places(metafunc.function.__name__))


@pytest.fixture(scope="session")
def kernels():
    """All Triton and CUDA kernels, compiled once for every target: records of
    `bench.kernel_compile`.
    """
    from bench import kernel_compile

    return kernel_compile.survey()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    # NumPy, in the interpreter, warns where fp32 becomes an infinity or a NaN; a GPU and torch do
    # not.
    quiet = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
    for item in items:
        if dispatch.interpreting():
            item.add_marker(quiet)
        if "where" in item.fixturenames:
            item.add_marker(pytest.mark.interpreter)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A skip without mark ``gpu`` is a failure: nothing may stay untested on a machine without a
    GPU.
    """
    report = yield
    if report.skipped and not item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped, but only gpu tests may be"
    return report
