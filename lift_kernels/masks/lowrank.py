"""Low-rank factors of weight matrices: W_r = L R^T, the best rank-r approximation.

There are two methods. *Gram* takes the top eigenvectors of the smaller Gram matrix; it is exact.
*Chebyshev* is subspace iteration (`chebyshev`). Its filter is a Chebyshev polynomial of A^T A,
where A is the matrix with its shorter side inside. It starts from a random block of about 2 r
vectors (cold start), or from the basis of the last mask, about 1.5 r vectors (warm start). It stops
when the Ritz energy, the sum of the top r Ritz values, has stalled. Matrices of one shape are
factored together, because small factorizations would leave a GPU idle. There bf16 matrices are
multiplied as they are, and all others in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.precision import has_bf16_products
from ..ops.symmetric_eigen import symmetric_eigen
from ..validation import check_finite, require
from . import costs
from .budget import check_rank
from .chebyshev import cold_block, exact_product, subspace_iteration, warm_block

METHODS = ("auto", "gram", "chebyshev", "svd")
TOLERANCE = 3e-5
"""The iteration has converged when the relative growth of the Ritz energy per degree is less.

On trained matrices about 0.3 % of a mask's entries are then still wrong, 2 % at worst.
"""
MAX_DEGREES, MAX_WARM_DEGREES = 24, 3


class LowRankFactors(NamedTuple):
    """Factors of W_r = left @ right.T, and how they were computed.

    Attributes:
        left, right: (m, r) and (n, r), fp32.
        basis: (min(m, n), l) bf16, for the next warm start; None where the exact method is cheaper.
        method: ``"gram"``, ``"svd"``, ``"chebyshev"``, ``"warm"``, ``"cold after warm"``, or
            ``"full rank"`` where W itself and the identity are the factors.
        passes: products with W or its transpose.
        converged: False when the iteration ended before the Ritz energy stalled.
    """

    left: Tensor
    right: Tensor
    basis: Tensor | None
    method: str
    passes: int
    converged: bool

    @property
    def settled(self) -> bool:
        """The old name of ``converged``; it goes with the next release."""
        return self.converged


@torch.no_grad()
def low_rank_factors(
    weight: Tensor,
    rank: int,
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    warm_start: Tensor | None = None,
    tolerance: float = TOLERANCE,
    name: str = "weight",
) -> LowRankFactors:
    """Factors of the best rank-r approximation of a matrix (paper section 3).

    One factor is orthonormal. Nothing is divided by a small singular value.

    Args:
        weight: (m, n), fp32, bf16 or fp16.
        rank: r, from 1 to min(m, n).
        method: ``"gram"`` and ``"svd"`` are exact, ``"chebyshev"`` iterates, ``"auto"`` takes the
            one that is predicted to be fastest.
        generator: of the random block of a cold start; by default one seeded with 0.
        warm_start: ``basis`` of an earlier call. A cold start follows when it does not converge.
        tolerance: relative growth of the Ritz energy over a degree at which the iteration stops.
        name: of the weight, for messages.

    Raises ValueError, naming ``name``, for a weight that is no matrix, a rank outside 1..min(m, n),
    an unknown method, a basis of another shape and non-finite entries.
    """
    return batched_factors(
        [weight], rank, method=method, generator=generator, warm_starts=[warm_start], tolerance=tolerance, names=[name]
    )[0]


def batched_factors(
    weights: Sequence[Tensor],
    rank: int,
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    warm_starts: Sequence[Tensor | None] | None = None,
    tolerance: float = TOLERANCE,
    names: Sequence[str] | None = None,
) -> list[LowRankFactors]:
    """`low_rank_factors` of matrices of one shape, dtype and device, computed together.

    Called where no gradients are recorded.

    Those with a warm start are iterated first, the others and those that did not converge after
    them.
    """
    names = names or [f"weight {i}" for i in range(len(weights))]
    warm_starts = warm_starts or [None] * len(weights)
    require(method in METHODS, f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    require(0.0 < tolerance < 1.0, f"tolerance must be between 0 and 1, got {tolerance}")
    for weight, start, name in zip(weights, warm_starts, names):
        _check(weight, rank, start, name)
    shape = weights[0].shape
    if method == "auto" and len(weights) == 1 and (found := small_factors(weights[0], rank)):
        return [found]
    units = _units(weights, names)
    if method == "auto" and rank == min(shape):  # W_r is W: nothing is left out
        return [_full(weight) for weight in weights]
    if method == "svd":
        return [_svd(weight, rank) for weight in weights]
    if method == "auto":
        all_warm = all(start is not None for start in warm_starts)
        method = costs.cheapest_method(shape, rank, warm=all_warm, device=weights[0].device.type)
    # A block of all directions has nothing to iterate.
    if method == "gram" or costs.block_width(shape, rank) == min(shape):
        if not weights[0].is_cuda:  # A batch would share out the cores of a CPU worse.
            return [_oriented(*_gram(_tall(w, unit), shape, rank), shape, unit) for w, unit in zip(weights, units)]
        longs, shorts, bases = _gram(_tall_batch(weights, units), shape, rank)
        every = bases if bases is not None else [None] * len(units)
        return [_oriented(*three, shape, unit) for three, unit in zip(zip(longs, shorts, every), units)]

    results: dict[int, LowRankFactors] = {}
    for warm in (True, False):
        members = [i for i, start in enumerate(warm_starts) if i not in results and (start is not None or not warm)]
        if not members:
            continue
        tall = _tall_batch([weights[i] for i in members], [units[i] for i in members])
        if warm:
            block = warm_block([warm_starts[i] for i in members], tall.device)  # type: ignore[misc]
        else:
            block = cold_block(tall, costs.block_width(shape, rank), generator)
        limit, kept = MAX_WARM_DEGREES if warm else MAX_DEGREES, costs.block_width(shape, rank, warm=True)
        ended = subspace_iteration(tall, block, rank, tolerance, limit, kept=kept, warm=warm)
        for at, i in enumerate(members):
            if ended.converged[at] or not warm:
                passes = ended.passes[at] + (0 if warm else 2)
                method_used = "warm" if warm else ("cold after warm" if warm_starts[i] is not None else "chebyshev")
                results[i] = _oriented(
                    ended.long[at],
                    ended.short[at],
                    ended.basis[at],
                    shape,
                    units[i],
                    method_used,
                    passes,
                    bool(ended.converged[at]),
                )
        del tall  # The next round makes its own, which may be as large.
    return [results[i] for i in range(len(weights))]


def check_basis(basis: Tensor, shape: torch.Size, rank: int, name: str) -> None:
    """Raise ValueError unless ``basis`` can be the warm start of an m x n matrix at this rank."""
    fits = basis.dim() == 2 and basis.shape[0] == min(shape) and rank <= basis.shape[1] <= min(shape)
    require(
        fits and basis.is_floating_point(),
        f"{name}: a warm start for shape {tuple(shape)} and rank {rank} is a floating ({min(shape)}, l >= {rank}) "
        f"basis, got {basis.dtype} {tuple(basis.shape)}; drop it, and a cold start is made",
    )


def _check(weight: Tensor, rank: int, warm: Tensor | None, name: str) -> None:
    if weight.dim() != 2:  # A message is only built where it is needed: small matrices notice its time.
        raise ValueError(f"{name}: a matrix is needed, got shape {tuple(weight.shape)}")
    check_rank(rank, weight.shape, name)
    if warm is not None:
        check_basis(warm, weight.shape, rank, name)


def _units(weights: Sequence[Tensor], names: Sequence[str]) -> list[float]:
    """For each matrix 1, or a power of two that brings its extreme entries to about 1.

    So squares stay in range, and no digit changes. One pass over each matrix, one wait for the
    device.
    """
    pairs = [torch.aminmax(weight.detach()) for weight in weights]
    if weights[0].is_cpu:
        extremes = [(float(low), float(high)) for low, high in pairs]
    else:  # one wait for all
        extremes = torch.stack([extreme for pair in pairs for extreme in pair]).float().view(-1, 2).tolist()
    units = []
    for (low, high), weight, name in zip(extremes, weights, names):
        largest = max(-low, high)
        if not math.isfinite(low) or not math.isfinite(high):
            check_finite(weight, name)
        exponent = math.frexp(largest)[1]
        units.append(1.0 if -24 <= exponent <= 24 or largest == 0.0 else 2.0 ** -max(-126, min(126, exponent)))
    return units


def _tall(weight: Tensor, unit: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(long, short) view or copy of a matrix in a dtype, in units of 1/unit."""
    matrix = weight.detach().to(dtype)
    if unit != 1.0:  # Only a copy is changed in place.
        matrix = matrix * unit if weight.dtype == dtype else matrix.mul_(unit)
    return matrix if weight.shape[0] >= weight.shape[1] else matrix.T


def _tall_batch(weights: Sequence[Tensor], units: Sequence[float]) -> Tensor:
    """(b, long, short): `_tall` of matrices of one shape, without a second copy of any.

    Each copy lies as its matrix does, so wide matrices give a transposed view.
    """
    dtype = factored_dtype(weights[0])
    if len(weights) == 1:
        return _tall(weights[0], units[0], dtype)[None]
    rows, columns = weights[0].shape
    out = torch.empty(len(weights), rows, columns, dtype=dtype, device=weights[0].device)
    for place, weight, unit in zip(out, weights, units):
        place.copy_(weight)
        if unit != 1.0:
            place.mul_(unit)
    return out if rows >= columns else out.mT


def factored_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matrix is multiplied: fp32, or bf16 where a GPU is fast with it."""
    bf16 = weight.dtype == torch.bfloat16 and has_bf16_products(weight.device)
    return torch.bfloat16 if bf16 else torch.float32


def _oriented(long, short, basis, shape, unit, method="gram", passes=2, converged=True) -> LowRankFactors:
    """Factors of W from those of the tall A: ``long`` carries the singular values."""
    long = long if unit == 1.0 else long / unit
    left, right = (long, short) if shape[0] >= shape[1] else (short, long)
    return LowRankFactors(left.contiguous(), right.contiguous(), basis, method, passes, converged)


def small_factors(weight: Tensor, rank: int) -> LowRankFactors | None:
    """`_gram` of one small matrix on the CPU, whose time is that of many small ops.

    None for other matrices, and for entries that are not finite or whose squares may leave the
    range: `_units` looks at those. The rank has been checked.
    """
    if not weight.is_cpu or not rank < min(weight.shape) <= costs.SMALL_SIDE:
        return None
    tall = weight.detach().float()
    if weight.shape[0] < weight.shape[1]:
        tall = tall.T
    gram = tall.T @ tall
    energy = float(gram.trace())  # the sum of all squares
    if not weight.numel() * 2.0**-48 <= energy <= 2.0**44:
        return None
    short = torch.linalg.eigh(gram).eigenvectors[:, -rank:].contiguous()  # ascending eigenvalues
    long = tall @ short
    left, right = (long, short) if weight.shape[0] >= weight.shape[1] else (short, long)
    return LowRankFactors(left, right, None, "gram", 2, True)


def _full(weight: Tensor) -> LowRankFactors:
    """W and the identity."""
    short = torch.eye(min(weight.shape), dtype=torch.float32, device=weight.device)
    long = weight.detach().float()
    left, right = (long, short) if weight.shape[0] >= weight.shape[1] else (short, long.T)
    return LowRankFactors(left.contiguous(), right.contiguous(), None, "full rank", 0, True)


def _svd(weight: Tensor, rank: int) -> LowRankFactors:
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return LowRankFactors((u[:, :rank] * s[:rank]).contiguous(), vh[:rank].T.contiguous(), None, "svd", 0, True)


def _gram(tall: Tensor, shape: torch.Size, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact factors of A, and the basis for a warm start where the iteration will be cheaper.

    ``tall`` is A (M, N), or a batch of them.
    """
    _, vectors = symmetric_eigen(exact_product(tall.mT, tall))  # ascending eigenvalues
    short = vectors[..., -rank:].contiguous()
    basis = None
    if costs.cheapest_method(shape, rank, warm=True, device=tall.device.type) == "chebyshev":
        basis = vectors[..., -costs.block_width(shape, rank, warm=True) :].to(torch.bfloat16)
    return exact_product(tall, short), short, basis
