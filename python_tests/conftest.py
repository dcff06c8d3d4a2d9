"""The fixture `backend`: each test of an op runs on every backend that this machine can run.

The suite runs twice. The plain run tests the reference and the native C++ ops on the CPU. Ops with
loops for each level of instruction sets are tested at every level of the machine. If there is a
CUDA device, the plain run also tests Triton and the native CUDA ops there. These tests have the
mark ``gpu`` and are the only ones that may be skipped. The other run,
``TRITON_INTERPRET=1 pytest -m interpreter``, tests the Triton kernels on CPU tensors.
"""

from __future__ import annotations

import platform

import pytest
import torch
from helpers.backends import OPS_BY_LEVEL, BackendDevice, cpu_level
from helpers.extras import MISSING

from lift_kernels.ops import cpu_levels, dispatch

collect_ignore = [file for file, names in MISSING.items() if names]


def pytest_terminal_summary(terminalreporter):
    for file, names in MISSING.items():
        if names:
            terminalreporter.write_line(f"{file} is left out: {' and '.join(names)} not installed")


def backend_params(test_name: str) -> list:
    """The parameters of `backend` for a test.

    The native CUDA backend is included in tests that are named after an op that it has.
    """
    if dispatch.interpreting():
        return [pytest.param(BackendDevice("triton", "cpu"), id="triton")]
    on_cuda = ["triton"]
    if any(test_name.startswith(f"test_{op.rstrip('_')}") for op in dispatch.ops_of("native-cuda")):
        on_cuda.append("native-cuda")
    return [
        pytest.param(BackendDevice("reference", "cpu"), id="reference"),
        pytest.param(BackendDevice("native-cpu", "cpu"), id="native-cpu", marks=pytest.mark.native),
        *level_params(test_name),
        *(pytest.param(BackendDevice(name, "cuda"), id=f"{name}-on-gpu", marks=pytest.mark.gpu) for name in on_cuda),
    ]


def level_params(test_name: str) -> list:
    """One more `native-cpu` for each level of the CPU that is not in use.

    They are for tests that are named after an op with loops of its own for each level.
    """
    used = dispatch.cpu_level()
    if not used or not test_name.startswith(tuple(f"test_{op}" for op in OPS_BY_LEVEL)):
        return []
    return [
        pytest.param(BackendDevice("native-cpu", "cpu", level), id=f"native-cpu-{level}", marks=pytest.mark.native)
        for level in cpu_levels.levels()
        if level != used
    ]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backend_params(metafunc.function.__name__))


@pytest.fixture(autouse=True)
def level_of_backend(request):
    """Let the CPU ops of a test use the level that its parameter `backend` names."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if not getattr(backend, "level", ""):
        yield
        return
    with cpu_level(backend.level):
        yield


@pytest.fixture(scope="session")
def kernels():
    """Records of `bench.kernels.compile`: all Triton and CUDA kernels, once per tested target."""
    from bench.kernels.compile import survey

    return survey(scope="tested")


@pytest.fixture(scope="session")
def cpu_objects(tmp_path_factory):
    """The object files of the extension by name, compiled for this machine as setup.py does."""
    from helpers.native_objects import compile_all

    return compile_all(tmp_path_factory.mktemp("cpu_objects"), platform.machine())


def runs_on_its_backend(item) -> bool:
    """Whether its module names no BACKENDS, or names the one of this item."""
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return backend is None or backend.name in getattr(item.module, "BACKENDS", (backend.name,))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    # In the interpreter, NumPy warns when fp32 overflows or turns NaN. A GPU and torch do not.
    quiet = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
    items[:] = [item for item in items if runs_on_its_backend(item)]
    for item in items:
        if dispatch.interpreting():
            item.add_marker(quiet)
        if "backend" in item.fixturenames:
            item.add_marker(pytest.mark.interpreter)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Turn a skip without mark ``gpu`` into a failure.

    Nothing else may stay untested on a machine without a GPU.
    """
    report = yield
    if report.skipped and not item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped, but only gpu tests may be"
    return report
