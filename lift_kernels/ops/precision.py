"""The precision of fp32 products on a GPU, whatever the user's setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def tf32_allowed() -> bool:
    """Return whether the user allows TF32 for products of fp32 matrices on a GPU.

    Torch has a newer switch and older ones. ``torch.get_float32_matmul_precision`` raises where the
    newer one was used, so this reads the newer one, which follows the others.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def matmul_precision(tensor: Tensor, precision: str) -> Iterator[None]:
    """Form products of fp32 matrices on a GPU in TF32 or exactly, for a while.

    On a CPU nothing changes. The setting belongs to the process, and it is restored. Torch's older
    switch, ``allow_tf32``, cannot even be read where the user took the newer one. TunableOp reads
    it, so TunableOp is disabled meanwhile.

    Args:
        tensor: its device decides.
        precision: ``"tf32"``, or ``"ieee"`` for exact products.
    """
    if not tensor.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    tuned = torch.cuda.tunable.is_enabled()
    if tuned:
        torch.cuda.tunable.enable(False)
    try:
        yield
    finally:
        matmul.fp32_precision = before
        if tuned:
            torch.cuda.tunable.enable(True)
