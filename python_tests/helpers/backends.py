"""A backend on a device, as the fixture `backend` gives it."""

from __future__ import annotations

from dataclasses import dataclass

from lift_kernels.ops import dispatch


@dataclass(frozen=True)
class BackendDevice:
    """A backend and the device whose tensors it takes."""

    name: str
    device: str


REFERENCE = BackendDevice("reference", "cpu")


def backend_of(backend: BackendDevice, op: str) -> str | None:
    """The backend to request for ``op``: None, the default, if `backend` does not have this op."""
    return backend.name if backend.name in dispatch.OPS[op] else None
