"""The fixture `where`: each test of an op runs on every backend that can run here.

The suite runs twice. The plain run takes the reference and the native C++ on the CPU, and on a CUDA
device Triton and the native CUDA ops (mark ``gpu``, the only tests that may be skipped).
``TRITON_INTERPRET=1 pytest -m interpreter`` takes the Triton kernels on CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.extras import MISSING

from lift_kernels.ops import dispatch

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
