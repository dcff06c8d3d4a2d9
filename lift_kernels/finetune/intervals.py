"""Intervals of what training changed, over samples that were measured before and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from .comparison.student import quantile


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean change of samples, and its 95 % interval by Student's t distribution.

    The interval is about other samples of the same kind. It says nothing of other seeds.

    Args:
        before: a figure of each sample.
        after: the same, of the same samples.

    Returns:
        Mean change, lower and upper bound. Fewer than two samples have no bounds.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    mean = fmean(changes)
    if len(changes) < 2:
        return mean, None, None
    half = quantile(0.975, len(changes) - 1) * stdev(changes) / math.sqrt(len(changes))
    return mean, mean - half, mean + half
