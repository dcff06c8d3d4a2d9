"""Which backends are usable here, why the others are not, and which one runs an op."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cpu_levels

logger = logging.getLogger("lift_kernels")

_INSTALL = "install with a C++ compiler: pip install --no-build-isolation . in a clone of lift_kernels"

NAMES = ("native-cpu", "native-cuda", "triton", "reference")

# The device type for which a backend can be the default. The reference runs on every device.
_DEFAULT_DEVICE = {"native-cpu": "cpu", "native-cuda": "cuda", "triton": "cuda", "reference": None}

OPS: dict[str, tuple[str, ...]] = {
    "sparse_adamw_": ("native-cpu", "triton", "reference"),
    "packed_gather": ("native-cpu", "native-cuda", "triton", "reference"),
    "packed_scatter_": ("native-cpu", "native-cuda", "triton", "reference"),
    "packed_migrate": ("native-cpu", "triton", "native-cuda", "reference"),
    "arena_migrate_": ("native-cpu", "triton", "reference"),
    "packed_l2_norm": ("native-cpu", "triton", "reference"),
    "packed_weight_grad": ("native-cpu", "triton", "reference"),
    "lowrank_topk": ("native-cpu", "triton", "reference"),
    "bitmap_to_indices": ("native-cuda", "triton", "reference"),
    "gaussian_sketch_": ("native-cuda", "reference"),
    "cholesky_qr_": ("native-cuda", "reference"),
    "chebyshev_step_": ("native-cuda", "reference"),
}
"""The backends of every op, fastest first. The first usable one is the default.

The subspace-iteration ops have no C++ CPU version, because there the reference calls LAPACK. They
have no Triton version either, because their factorizations are awkward to write in Triton.
"""


@dataclass(frozen=True)
class Backend:
    """The state of one backend on this machine.

    Attributes:
        usable: whether it can run here.
        reason: what it is, or why it cannot run.
    """

    usable: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Return the state of every backend on this machine.

    It never needs a GPU and never raises.

    Returns:
        `Backend` records by name: native-cpu, native-cuda, triton, reference. Each has ``usable``
        and ``reason``.

    >>> for name, backend in lift_kernels.backends().items():
    ...     print(name, backend.usable, backend.reason)
    """
    return {"native-cpu": _native_cpu(), "native-cuda": _native_cuda(), "triton": _triton(), "reference": _REFERENCE}


def ops_of(backend: str) -> tuple[str, ...]:
    """Return the ops that a backend has, in the order of `OPS`."""
    return tuple(op for op, names in OPS.items() if backend in names)


def choose(requested: str | None, device: torch.device, op: str) -> str:
    """Return the backend that runs ``op`` on ``device``.

    Args:
        requested: name of a backend. None takes the fastest usable one.
        device: of the tensors.
        op: a key of `OPS`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the requested backend cannot run here. The message names the reason.
    """
    if requested is None:
        return _default(device.type, OPS[op])
    if requested not in NAMES:
        raise ValueError(f"unknown backend {requested!r}; choose one of {', '.join(NAMES)}")
    problem = _problem(requested, device.type)
    if requested not in OPS[op]:
        problem = f"the op has {', '.join(OPS[op])}; choose one of these, or None"
    if problem:
        raise RuntimeError(f"backend {requested!r} cannot run {op} on {device.type} tensors here: {problem}")
    return requested


@functools.cache
def native_op(op: str, name: str | None = None) -> Callable | None:
    """Return the private native op where CPU tensors go to it by default, otherwise None.

    A hit of the cache runs no Python code. So an op that asks here first needs nothing of this
    module afterwards, which matters where a step finds the caches full of gradients.

    Args:
        op: a key of `OPS`.
        name: of the private op, if it is not that of ``op``.
    """
    if choose(None, torch.device("cpu"), op) != "native-cpu":
        return None
    return getattr(torch.ops.lift_kernels_native, name or op).default


def cpu_level() -> str:
    """Return the level of instruction sets that CPU ops use, such as ``x86-64-v3``.

    It is the highest that the CPU has, or the one that LIFT_CPU_LEVEL named when the library was
    loaded. It is empty where the compiled code cannot run.
    """
    return "" if _load_native() or cpu_levels.problem() else cpu_levels.used()


def wrong_cpu_level() -> str:
    """Return why the level that LIFT_CPU_LEVEL names cannot be used, or an empty string."""
    return "" if _load_native() else cpu_levels.wrong_choice()


@functools.cache
def _default(device_type: str, candidates: tuple[str, ...]) -> str:
    """Return the first usable backend for a device, and warn once if it is not the fastest.

    Raises ValueError where LIFT_CPU_LEVEL names a level that cannot be used, for what follows would
    be a fallback that nobody wants.
    """
    names = [name for name in candidates if _DEFAULT_DEVICE[name] in (device_type, None)]
    if "native-cpu" in names and wrong_cpu_level():
        raise ValueError(wrong_cpu_level())
    chosen = next(name for name in names if not _problem(name, device_type))
    if chosen != names[0]:
        _warn_once(chosen, device_type, names[0])
    return chosen


@functools.cache
def _warn_once(chosen: str, device_type: str, missing: str) -> None:
    logger.warning(
        "falling back to the slower %s backend for %s tensors: %s is unavailable (%s)",
        chosen,
        device_type,
        missing,
        _problem(missing, device_type),
    )


def _problem(name: str, device_type: str) -> str:
    """Return why a backend cannot run on tensors of this device type, or an empty string."""
    status = backends()[name]
    if not status.usable:
        return status.reason
    runs_on = {"native-cpu": "cpu", "native-cuda": "cuda", "triton": "cpu" if interpreting() else "cuda"}
    if name in runs_on and runs_on[name] != device_type:
        return f"it only runs on {runs_on[name]} tensors"
    return ""


def interpreting() -> bool:
    """Return whether Triton kernels run in its interpreter, on CPU tensors.

    That is so when TRITON_INTERPRET=1 was set before triton was imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def capturing() -> bool:
    """Return whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def native_library() -> Path | None:
    """Return the path of the compiled extension, or None if there is none."""
    spec = importlib.util.find_spec("lift_kernels._C")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


@functools.cache
def _load_native() -> str:
    """Register the private ops ``lift_kernels_native``.

    Returns:
        Why they cannot be loaded, or an empty string.
    """
    library = native_library()
    if library is None:
        return f"the compiled extension lift_kernels._C is missing; {_INSTALL}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:  # an extension built for a newer torch, or a damaged file
        return f"{library.name} does not load under torch {torch.__version__}: {error}; {_INSTALL}"
    if not cpu_levels.problem():
        cpu_levels.take()
    return ""


def _native_cpu() -> Backend:
    problem = _load_native() or cpu_levels.problem()
    return Backend(not problem, problem or f"compiled C++ for the CPU, {cpu_levels.description()}")


@functools.cache
def _native_cuda() -> Backend:
    problem = _load_native()
    if problem:
        return Backend(False, problem)
    runtime = torch.ops.lift_kernels_native.cuda_runtime_version()
    if runtime == 0:
        return Backend(
            False,
            "the extension was built without CUDA; nvcc or its static runtime was not found at build time; install "
            "the CUDA toolkit, and build again",
        )
    if not torch.cuda.is_available():
        return Backend(False, "torch sees no CUDA device")
    driver = torch.ops.lift_kernels_native.cuda_driver_version()
    if driver // 1000 < runtime // 1000:
        old = f"the driver supports CUDA {driver // 1000}, the extension was built for CUDA {runtime // 1000}"
        return Backend(False, f"{old}; update the driver, or use the triton backend")
    if not torch.ops.lift_kernels_native.cuda_has_code():
        major, minor = torch.cuda.get_device_capability()
        needs = f"rebuild it with LIFT_CUDA_ARCHS={major}{minor}, or use the triton and reference backends"
        return Backend(False, f"the extension has no code for this device (sm_{major}{minor}); {needs}")
    return Backend(True, f"compiled CUDA {runtime // 1000}.{runtime % 1000 // 10}: {', '.join(ops_of('native-cuda'))}")


@functools.cache
def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed; pip install triton")
    if interpreting():
        return Backend(True, "in the interpreter, on CPU tensors (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Backend(False, "torch sees no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU for tests")
    return Backend(True, "Triton kernels on CUDA devices")


_REFERENCE = Backend(True, "plain PyTorch on any device (slow)")
