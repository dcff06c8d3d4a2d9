"""Samples of trained entries: they tell whether a mask or a state belongs to the present weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..validation import require

KEY = "weight_sample"
"""Of a sample in the saved state of a matrix."""
_ENTRIES = 256
_BITS = {2: torch.int16, 4: torch.int32}


def sample_of(weight: Tensor, indices: Tensor) -> Tensor:
    """(n,) entries of a weight, in its dtype, that lie evenly in its index list (`sample_size`)."""
    return _entries(weight, indices, sample_size(weight.shape, indices.numel()))


def sample_size(shape: torch.Size, k: int) -> int:
    """n, how many of the k trained entries of a matrix are sampled.

    n is at most 256, or the number of matrices of a 3-D batch where that is more. Each of these has
    the same number of trained entries, so each is in the sample.
    """
    parts = 1 if len(shape) == 2 else shape[0]
    return min(k, max(_ENTRIES, parts))


def count_differing(sample: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """How many entries of a `sample_of` a weight with this index list differ now, 0-dim.

    Bits are compared, after both are rounded to the dtype of fewer bits. So a state that was saved
    with a bf16 model fits its fp32 copy, and the other way round.
    """
    present = _entries(weight, indices, sample.numel())
    dtype = sample.dtype if sample.dtype.itemsize < weight.dtype.itemsize else weight.dtype
    bits = _BITS[dtype.itemsize]
    there = sample.to(present.device, dtype)
    return (there.view(bits) != present.to(dtype).view(bits)).sum()


def check_sample(sample: Tensor, entries: int, name: str) -> None:
    """Raise ValueError or TypeError, naming the matrix, for what is no sample of its entries."""
    require(
        sample.dim() == 1 and 1 <= sample.numel() <= entries,
        f"{name}: {KEY} of the state dict must hold 1 to {entries} numbers, got shape {tuple(sample.shape)}; drop "
        "the key to load the state without it",
    )
    require(
        sample.is_floating_point() and sample.dtype.itemsize in _BITS,
        f"{name}: {KEY} of the state dict must be float32, bfloat16 or float16, got {sample.dtype}; drop the key to "
        "load the state without it",
        TypeError,
    )


def _entries(weight: Tensor, indices: Tensor, n: int) -> Tensor:
    """n entries of a weight, evenly from its index list. Nothing waits for the device."""
    places = torch.arange(n, device=indices.device) * indices.numel() // n
    return ops.packed_gather(weight.detach(), indices[places])
