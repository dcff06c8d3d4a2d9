"""What `bench.common.fake_cuda` puts in place of parts of a CUDA build, beside torch functions."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.common.device_events import Call
from lift_kernels.ops.device_tables import DeviceTables


class Solvers:
    """A cuSOLVER whose functions do nothing and succeed.

    Args:
        launch: `FakeCuda.launch`, which hears of the batched solver.
    """

    def __init__(self, launch: Callable[[str, Call], None]) -> None:
        self._launch = launch

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            if name == "cusolverDnXsyevBatched":
                side, batch = arguments[4].value, arguments[-1].value
                self._launch(name, Call(name, (), {"side": side, "batch": batch}))
            return 0

        return function


@contextlib.contextmanager
def empty_tables() -> Iterator[None]:
    """Let the caches of device tables be empty inside, so that no fake table is found later."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "lift_kernels"]
    tables = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, DeviceTables)}
    before = [(table, dict(vars(table))) for table in tables.values()]
    for table, attributes in before:
        vars(table).update({key: type(value)() for key, value in attributes.items() if isinstance(value, dict)})
    try:
        yield
    finally:
        for table, attributes in before:
            vars(table).clear()
            vars(table).update(attributes)


@contextlib.contextmanager
def device_guard() -> Iterator[None]:
    """Give C++ code a guard of CUDA devices inside (``device_guard.cpp``)."""
    library = _guard_library()
    library.put_in()
    try:
        yield
    finally:
        library.take_out()


@functools.cache
def _guard_library() -> ctypes.CDLL:
    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).with_name("device_guard.cpp")
    flags = ["-std=c++20", "-shared", "-fPIC", "-L", torch_folder / "lib"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "device_guard.so"
        command = ["g++", source, *flags, "-I", torch_folder / "include", "-o", target, "-lc10"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(target))
