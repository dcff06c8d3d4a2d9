"""Which method makes the factors of a matrix fastest, what a mask costs, how wide blocks are."""

from __future__ import annotations

import math
from collections.abc import Sequence

OVERSAMPLING, WARM_OVERSAMPLING = 2.0, 1.5
"""Vectors of the iterated block per rank, after a cold and a warm start.

Spectra are flat, so a wide block converges in far fewer degrees. After a warm start one or two are
enough, and a narrower block makes them cheaper.
"""
SMALL_SIDE = 256
"""Shorter sides up to here take the exact method: overheads decide there, not flops."""
# Cost of an n x n eigenproblem, in flops of a product per n^3. Measured; on an H100 it is 600 for
# one of 4096, and 900 to 7000 for each of a batch of 32 to 128 of sides 128 and 256.
_EIGH_COST = {"cpu": 12.0, "cuda": 2000.0}
_EXACT_BONUS = 1.5  # auto leaves the exact method only for a predicted cost this many times lower


def cheapest_method(shape: Sequence[int], rank: int, *, warm: bool = False, device: str = "cpu") -> str:
    """``"gram"`` or ``"chebyshev"``: the faster one for an m x n matrix, predicted from flops.

    ``"gram"`` where a cold block would have all directions: there is nothing to iterate.
    """
    if min(shape) <= SMALL_SIDE or block_width(shape, rank) == min(shape):
        return "gram"
    gram, chebyshev = _gram_flops(shape, rank, device), _chebyshev_flops(shape, rank, warm, device)
    return "chebyshev" if chebyshev * (1.0 if warm else _EXACT_BONUS) < gram else "gram"


def mask_cost(shape: Sequence[int], rank: int, *, warm: bool = False, device: str = "cpu") -> float:
    """Predicted flops of the principal mask of an m x n matrix: its factors and their product."""
    product = 2.0 * shape[0] * shape[1] * rank
    if rank == min(shape):  # The matrix is its own approximation.
        return product
    method = cheapest_method(shape, rank, warm=warm, device=device)
    flops = _gram_flops(shape, rank, device) if method == "gram" else _chebyshev_flops(shape, rank, warm, device)
    return flops + product


def _gram_flops(shape: Sequence[int], rank: int, device: str) -> float:
    long, short = max(shape), min(shape)
    return 2.0 * long * short**2 + _eigh_cost(device) * short**3 + 2.0 * long * short * rank


def _chebyshev_flops(shape: Sequence[int], rank: int, warm: bool, device: str) -> float:
    long, short = max(shape), min(shape)
    width, degrees, passes = block_width(shape, rank, warm=warm), 1 if warm else 7, 3 if warm else 17
    # Gram matrix, orthonormalization, Ritz values.
    small = 2.0 * long * width**2 + 6.0 * short * width**2 + _eigh_cost(device) * width**3
    return passes * 2.0 * long * short * width + (degrees + 1) * small


def _eigh_cost(device: str) -> float:
    return _EIGH_COST.get(device, _EIGH_COST["cuda"])


def block_width(shape: Sequence[int], rank: int, *, warm: bool = False) -> int:
    """l, the vectors of the iterated block. For a warm start they are the columns of its basis."""
    return min(min(shape), max(math.ceil((WARM_OVERSAMPLING if warm else OVERSAMPLING) * rank), rank + 8))
