"""Where the k-th largest |W_r| is expected: intervals that let `lowrank_topk` choose in one
sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import counter_hash

WIDTH = 0.02
"""Half width, relative, of the interval around the threshold of the last refresh: its rms error is
0.1 %, 0.6 % at most.
"""
_MIN_SAMPLES, _MAX_SAMPLES, _SHARE = 1024, 16384, 16
_DEVIATIONS = 3.0  # of the sampled quantile: misses one bracket in four hundred, which costs three sweeps more


def around(threshold: Tensor) -> Tensor:
    """(..., 2) fp32 intervals around the k-th magnitudes (...) of the last refresh."""
    return torch.stack([threshold * (1 - WIDTH), threshold * (1 + WIDTH)], -1).float()


def sampled(left: Tensor, right: Tensor, k: int) -> Tensor:
    """(2,) fp32 interval from quantiles of drawn entries of |left right^T|; the same for the same
    factors.

    Entries are drawn one by one, one in each of S equal stretches of the matrix: whole tiles would
    be correlated.
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
