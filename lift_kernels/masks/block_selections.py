"""Selections of whole blocks and runs of entries, for comparisons only.

Kernels could read and write blocks faster than single entries. Whether such kernels are worth
building depends on how well a model trains with the entries of blocks. These selections are for
that question, as ``selection=`` of `LiftAdamW` and `pack_gradients`::

    LiftAdamW(groups, selection=principal_blocks(rank=64))

They compute W_r itself and a number for each entry, without care for speed and memory.

Blocks at the edges of a matrix are smaller where its sides are no multiples of the block. The last
block that is chosen is cut to exactly k entries: its first ones, row by row. An equal block of
lower position goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import require
from .chebyshev import exact_product
from .lowrank import low_rank_factors


def principal_blocks(rank: int, shape: tuple[int, int] = (4, 4)) -> Callable[[Tensor, int], Tensor]:
    """Selects the blocks with the largest sum of |W_r|.

    Args:
        rank: r of the approximation W_r, at most the smaller side of each matrix.
        shape: rows and columns of a block.

    Returns:
        ``(weight, k) -> (k,)`` sorted int32 positions. It raises ValueError for non-finite weights
        and for a k that the matrix does not have.

    Raises ValueError, naming the argument, for a rank or a side below 1.
    """
    _check_positive(rank, "rank")
    require(isinstance(shape, tuple) and len(shape) == 2, f"shape must be (rows, columns) of a block, got {shape!r}")
    for side in shape:
        _check_positive(side, "each side of shape")
    name = f"principal_blocks(rank={rank}, shape={shape})"
    return _named(partial(_principal, rank=rank, shape=shape), name)


def principal_runs(rank: int, length: int = 16) -> Callable[[Tensor, int], Tensor]:
    """Selects the runs along rows with the largest sum of |W_r|, as `principal_blocks` does.

    Args:
        rank: r of the approximation W_r, at most the smaller side of each matrix.
        length: columns of a run.
    """
    _check_positive(rank, "rank")
    _check_positive(length, "length")
    return _named(partial(_principal, rank=rank, shape=(1, length)), f"principal_runs(rank={rank}, length={length})")


def random_runs(seed: int, length: int = 16) -> Callable[..., Tensor]:
    """Selects random runs along rows.

    The draw depends on ``seed``, on the shape and on the number that a matrix has among all that
    get masks, as that of ``selection="random"`` does. So it is another for each matrix, and the
    same at a refresh, after a resumption, for another optimizer on the same parameters and for
    `pack_gradients`, with any ``refresh_interval``. Neither the weights nor a count of calls would
    do: the former change between refreshes, and the latter with the order of the refreshes.

    Args:
        seed: of the draws.
        length: columns of a run.

    Returns:
        ``(weight, k, number=0) -> (k,)`` sorted int32 positions. LIFT gives the number.

    Raises ValueError or TypeError, naming the argument, for one that cannot work.
    """
    require(isinstance(seed, int) and not isinstance(seed, bool), f"seed must be an integer, got {seed!r}", TypeError)
    _check_positive(length, "length")
    chosen = partial(_random, seed=seed, length=length)
    return _named(chosen, f"random_runs(seed={seed}, length={length})", numbered=True)


def _principal(weight: Tensor, k: int, *, rank: int, shape: tuple[int, int]) -> Tensor:
    factors = low_rank_factors(weight, min(rank, *weight.shape))
    size = exact_product(factors.left, factors.right.T).abs_()
    (m, n), (rows, columns) = weight.shape, shape
    size = nn.functional.pad(size, (0, -n % columns, 0, -m % rows))
    sums = size.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3), dtype=torch.float64)
    order = sums.flatten().argsort(descending=True, stable=True)
    return _first_entries(_block_of_entries(weight, shape), order, k)


def _random(weight: Tensor, k: int, *, seed: int, length: int, number: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + number)
    runs = weight.shape[0] * -(-weight.shape[1] // length)
    order = torch.randperm(runs, generator=generator).to(weight.device)
    return _first_entries(_block_of_entries(weight, (1, length)), order, k)


def _block_of_entries(weight: Tensor, shape: tuple[int, int]) -> Tensor:
    """The number of the block that each entry is in, (m * n,) int64. They go row by row."""
    (m, n), (rows, columns) = weight.shape, shape
    down, along = torch.arange(m, device=weight.device) // rows, torch.arange(n, device=weight.device) // columns
    return (down[:, None] * -(-n // columns) + along).view(-1)


def _first_entries(block: Tensor, order: Tensor, k: int) -> Tensor:
    """Sorted int32 positions of the first k entries, where blocks come in this order."""
    require(1 <= k <= block.numel(), f"k must be from 1 to the {block.numel()} entries of the matrix, got {k}")
    ends = torch.bincount(block, minlength=order.numel())[order].cumsum(0)
    whole = int((ends <= k).sum())
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    place_of_entry = place[block]
    chosen = place_of_entry < whole
    missing = k - int(chosen.sum())
    chosen[(place_of_entry == whole).nonzero().flatten()[:missing]] = True
    return chosen.nonzero().flatten().int()


def _check_positive(value: Any, what: str) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(good, f"{what} must be an integer of at least 1, got {value!r}")


def _named(selection: Callable[..., Tensor], name: str, numbered: bool = False) -> Callable[..., Tensor]:
    """A `partial` with the name that messages show. Unlike a closure it can be pickled."""
    vars(selection).update(__name__=name, numbered=numbered)
    return selection
