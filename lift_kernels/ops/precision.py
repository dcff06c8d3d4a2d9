"""The precision of products on a GPU, whatever the user's setting."""

from __future__ import annotations

import functools
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


def has_bf16_products(device: torch.device) -> bool:
    """Return whether `bf16_product` is fast on a device.

    NVIDIA's tensor cores know bf16 from sm_80 on. Torch refuses it with fp32 sums on some AMD
    GPUs, and CPUs take longer than for fp32.
    """
    return device.type == "cuda" and torch.version.hip is None and _capability(device.index) >= (8, 0)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a card. Fake CUDA tensors count as on an H100."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else (9, 0)


def bf16_product(a: Tensor, b: Tensor, terms: int = 1) -> Tensor:
    """Multiply bf16 matrices with fp32 ones on bf16 tensor cores, with sums in fp32.

    Each entry of ``b`` becomes a sum of ``terms`` bf16 numbers: 1 term has 8 significant bits, 2
    have 16, and 3 have the 24 of fp32. Their products stand side by side in one call, so that ``a``
    is read once.

    Args:
        a: (b, m, k) bf16. Nothing is rounded here.
        b: (b, k, n), or (k, n) for all, fp32 or bf16. Entries of bf16 are one term.
        terms: bf16 numbers for an fp32 entry.

    Returns:
        (b, m, n) fp32, contiguous.
    """
    if b.dtype == torch.bfloat16:
        return _with_fp32_sums(a, b)
    width = b.shape[-1]
    split = b.new_empty(*b.shape[:-1], terms * width, dtype=torch.bfloat16)
    rest = b
    for term, part in enumerate(split.split(width, dim=-1), start=1):
        part.copy_(rest)
        rest = rest - part if term < terms else rest
    product = _with_fp32_sums(a, split)
    return product if terms == 1 else product.unflatten(-1, (terms, width)).sum(-2)


def _with_fp32_sums(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        with matmul_precision(a, "ieee"):  # TunableOp, which that disables, refuses two dtypes.
            return torch.bmm(a, b.expand(len(a), -1, -1), out_dtype=torch.float32)
    return a.float() @ b.float()  # Torch has no such product on CPUs. These have the same digits.
