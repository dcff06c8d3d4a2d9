"""A backend on a device, as the fixture `backend` gives it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lift_kernels.ops import cpu_levels, dispatch


@dataclass(frozen=True)
class BackendDevice:
    """A backend and the device whose tensors it takes."""

    name: str
    device: str
    level: str = ""  # of the CPU ops; empty for the one in use


REFERENCE = BackendDevice("reference", "cpu")
STATE_FORMS = ("reference", "native-cpu", "triton")
"""Backends that take 8-bit moments, low halves of masters and packed weights."""
OPS_BY_LEVEL = ("sparse_adamw", "packed_l2_norm", "lowrank_topk")
"""Ops whose loops are compiled for each level of instruction sets (csrc/cpu/levels.h)."""


@contextlib.contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Let the CPU ops use a level, and afterwards the one that they used before."""
    native = torch.ops.lift_kernels_native
    before = native.cpu_level()
    native.use_cpu_level(cpu_levels.levels().index(name))
    try:
        yield
    finally:
        native.use_cpu_level(before)


def backend_of(backend: BackendDevice, op: str) -> str | None:
    """The backend to request for ``op``: None, the default, if `backend` does not have this op."""
    return backend.name if backend.name in dispatch.OPS[op] else None
