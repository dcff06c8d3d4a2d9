"""Intervals that are expected to hold the k-th largest |W_r|.

If the interval is right, `lowrank_topk` selects in one sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stochastic_rounding import counter_hash

WIDTH = 0.02
"""Relative half width of the interval around the threshold of the last refresh.

The rms error of that prediction is 0.1 %, and 0.6 % at most.
"""
_MIN_SAMPLES, _MAX_SAMPLES, _SHARE = 1024, 16384, 16
# In standard deviations of the sampled quantile: one bracket in four hundred is missed, which costs
# three more sweeps.
_DEVIATIONS = 3.0


def around(threshold: Tensor) -> Tensor:
    """Return (..., 2) fp32 intervals around the k-th magnitudes (...) of the last refresh."""
    return torch.stack([threshold * (1 - WIDTH), threshold * (1 + WIDTH)], -1).float()


def sampled(left: Tensor, right: Tensor, k: int) -> Tensor:
    """Return a (2,) fp32 interval from quantiles of sampled entries of |left right^T|.

    The same factors give the same interval. One entry is drawn from each of S equal stretches of
    the matrix, because the entries of whole tiles would be correlated.

    Args:
        left: (m, r) fp32.
        right: (n, r) fp32.
        k: rank of the magnitude, 1 to m * n.
    """
    m, n = left.shape[0], right.shape[0]
    numel = m * n
    count = min(numel, max(_MIN_SAMPLES, min(_MAX_SAMPLES, numel // _SHARE)))
    number = torch.arange(count, dtype=torch.int64, device=left.device)
    start = number * numel // count
    length = (number + 1) * numel // count - start
    position = start + counter_hash(number) % length
    magnitude = (left[position // n] * right[position % n]).sum(1).abs().sort().values
    share = k / numel
    spread = _DEVIATIONS * (share * (1 - share) / count) ** 0.5
    low, high = int((1 - share - spread) * count) - 1, int((1 - share + spread) * count) + 2
    edges = [
        magnitude[low] if low >= 0 else magnitude.new_zeros(()),
        magnitude[high] if high < count else magnitude.new_full((), torch.inf),
    ]
    return torch.stack(edges)
