"""What fp32 products on a GPU are formed in, whatever the user's setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def tf32_allowed() -> bool:
    """Whether the user lets products of fp32 matrices on a GPU be formed in TF32, by torch's newer
    switch or by an older one.

    ``torch.get_float32_matmul_precision`` raises where the newer one was used.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextmanager
def matmul_precision(tensor: Tensor, precision: str) -> Iterator[None]:
    """Products of fp32 matrices on the device of ``tensor``: in ``"tf32"`` or exact (``"ieee"``);
    on a CPU nothing changes.

    The setting is the process's, and comes back. Torch's older switch, ``allow_tf32``, cannot even
    be read where the user took the newer one. TunableOp reads it, and so is left out meanwhile.
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
