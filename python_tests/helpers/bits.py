"""Dtypes, bit patterns, index lists and the comparison of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LAST = 2**31 - 1
HANG_S = 1800  # for processes that hang; a busy machine may take many times as long as a quiet one


def random_indices(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` sorted, unique int32 positions below ``numel``."""
    return torch.randperm(numel, generator=generator)[:count].sort().values.to(torch.int32)


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern as integers, so NaN and signed zeros can be compared."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()]) if tensor.is_floating_point() else tensor


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that two `state`s or `inputs` are equal to the bit."""
    assert actual.keys() == expected.keys()
    for name in expected:
        differ = (actual[name] != expected[name]).sum().item()
        assert differ == 0, f"{name}: {differ} entries differ"


def two_ulp(tensor: Tensor) -> float:
    """Two fp32 units in the last place of the largest entry."""
    return 2 * math.ulp(1.0) * 2.0**29 * 2.0 ** math.floor(math.log2(max(tensor.abs().max().item(), 2.0**-126)))


def assert_near(stored: Tensor, truth: Tensor, yardstick: Tensor, label: str, rounding=None) -> None:
    """Check that ``stored`` is a rounding of fp32 values near enough to ``truth``.

    The largest allowed error is twice that of ``yardstick``, and at least 2 ulp. In a narrow format
    ``stored`` must lie between the roundings of the smallest and the largest allowed fp32 value.
    ``rounding`` maps from fp32, is monotone, and is to nearest unless given.
    """
    ordinary = (yardstick - truth).abs()
    bound = max(2 * ordinary.max().item(), two_ulp(truth))
    rounding = rounding or (lambda x: x.to(stored.dtype))
    if stored.dtype == FP32:
        error = (stored.double() - truth).abs()
        mean = max(2 * ordinary.mean().item(), two_ulp(truth))
        assert error.max().item() <= bound, f"{label}: error {error.max().item()}, admitted {bound}"
        assert error.mean().item() <= mean, f"{label}: mean error {error.mean().item()}, admitted {mean}"
        return
    low, high = rounding((truth - bound).float()).double(), rounding((truth + bound).float()).double()
    outside = ((stored.double() < low) | (stored.double() > high)).sum().item()
    assert outside == 0, f"{label}: {outside} entries are not the rounding of an admissible fp32 value"
    # The comparison must be strict: nearly everywhere only one value is right.
    assert (low == high).double().mean() > 0.9, f"{label}: the comparison is too loose"


def int32(values, backend):
    return torch.tensor(values, dtype=torch.int32, device=backend.device)
