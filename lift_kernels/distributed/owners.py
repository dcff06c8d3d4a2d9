"""Which rank does which part of a work that all ranks need."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each item: the costliest first, each to the rank with the least to do.

    This is Graham's rule of the longest processing time first. The largest load is at most 4/3 of
    the best possible one. Equal ``costs`` give equal answers on every rank.
    """
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
