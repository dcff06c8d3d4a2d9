"""Which method makes the factors of a matrix fastest, what a mask costs, how wide blocks are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..ops.symmetric_eigen import solved_together

OVERSAMPLING, WARM_OVERSAMPLING = 2.0, 1.5
"""Vectors of the iterated block per rank, after a cold and a warm start.

Spectra are flat, so a wide block converges in far fewer degrees. After a warm start one or two are
enough, and a narrower block makes them cheaper.
"""
SMALL_SIDE = 256
"""Shorter sides up to here take the exact method: overheads decide there, not flops."""
_BATCH = 32  # matrices of one shape that a model has, about
# Time of one n x n eigenproblem, in flops of the products. Measured on two machines: a CPU of two
# cores, and an H100 at 412 TFLOP/s (TF32). There a batch takes 9.4 us n, however many they are, and
# each matrix as long as 600 n^3 flops. Problems that torch solves one after the other take 22 us n
# at least.
_EIGH_FLOPS: dict[str, Callable[[float], float]] = {
    "cpu": lambda n: 12.0 * n**3,
    "cuda, together": lambda n: 3.9e9 * n / _BATCH + 600.0 * n**3,
    "cuda, one by one": lambda n: max(9.0e9 * n, 600.0 * n**3),
}
_EXACT_BONUS = 1.5  # auto leaves the exact method only for a predicted cost this many times lower


def cheapest_method(shape: Sequence[int], rank: int, *, warm: bool = False, device: str = "cpu") -> str:
    """``"gram"`` or ``"chebyshev"``: the faster one for an m x n matrix, predicted from flops.

    ``"gram"`` where a cold block would have all directions: there is nothing to iterate.
    """
    if min(shape) <= SMALL_SIDE or block_width(shape, rank) == min(shape):
        return "gram"
    gram, chebyshev = _gram_flops(shape, rank, device), _chebyshev_flops(shape, rank, warm, device)
    return "chebyshev" if chebyshev * (1.0 if warm else _EXACT_BONUS) < gram else "gram"


def may_leave_basis(shape: Sequence[int], rank: int) -> bool:
    """Whether `cheapest_method` iterates from a basis on some device, with some version of torch.

    Saved states keep a place for the basis then, and go from one to the other.
    """
    if min(shape) <= SMALL_SIDE or block_width(shape, rank) == min(shape):
        return False
    return any(_chebyshev_flops(shape, rank, True, kind) < _gram_flops(shape, rank, kind) for kind in _EIGH_FLOPS)


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
    return 2.0 * long * short**2 + _eigh_flops(short, device) + 2.0 * long * short * rank


def _chebyshev_flops(shape: Sequence[int], rank: int, warm: bool, device: str) -> float:
    long, short = max(shape), min(shape)
    width, passes = block_width(shape, rank, warm=warm), 3 if warm else 17
    # Gram matrix, Ritz values, orthonormalization. A warm start needs them after its degree alone.
    # On the CPU they count twice: they take longer than their flops, and smaller matrices need a
    # second degree. Counted once, the iteration was chosen where it takes 1.2 to 3.7 times as long.
    small = 2.0 * long * width**2 + _eigh_flops(width, device) + 6.0 * short * width**2
    rounds = (2 if device == "cpu" else 1) if warm else 8
    return passes * 2.0 * long * short * width + rounds * small


def _eigh_flops(side: int, device: str) -> float:
    """Of a type of device, or of a key of `_EIGH_FLOPS`."""
    if device not in _EIGH_FLOPS:
        device = "cuda, together" if solved_together(side) else "cuda, one by one"
    return _EIGH_FLOPS[device](side)


def block_width(shape: Sequence[int], rank: int, *, warm: bool = False) -> int:
    """l, the vectors of the iterated block. For a warm start they are the columns of its basis."""
    return min(min(shape), max(math.ceil((WARM_OVERSAMPLING if warm else OVERSAMPLING) * rank), rank + 8))


def factoring_bytes(shape: Sequence[int], rank: int, itemsize: int, method: str = "chebyshev") -> int:
    """Memory that an m x n matrix takes while it is factored on a GPU, about.

    It is the copy, of ``itemsize`` bytes an entry, and three fp32 blocks on either side. ``"gram"``
    has three fp32 Gram matrices, where those are larger. ``"auto"`` takes that method where they
    are not, or are small: then it needs up to twice as much.
    """
    entries = block_width(shape, rank) * (shape[0] + shape[1])
    if method == "gram":
        entries = max(entries, min(shape) ** 2)
    return itemsize * shape[0] * shape[1] + 3 * 4 * entries
