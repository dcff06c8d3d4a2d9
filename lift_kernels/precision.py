"""What fp32 products on a GPU are formed in, whatever the user's setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def matmul_precision(tensor: Tensor, precision: str) -> Iterator[None]:
    """Products of fp32 matrices on the device of ``tensor``: in ``"tf32"`` or exact (``"ieee"``); on a CPU nothing changes.

    The setting is the process's, and comes back. Torch's older switch, ``allow_tf32``, cannot even be read where the user took the
    newer one.
    """
    if not tensor.is_cuda:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
