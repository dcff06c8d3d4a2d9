"""Chebyshev-filtered subspace iteration: the top singular subspace of a batch of tall matrices.

The recurrence runs here. Its arithmetic is the op `chebyshev_step_` (`ops/subspace_ops.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.precision import bf16_product, matmul_precision
from ..ops.symmetric_eigen import symmetric_eigen

_CYCLE = 3  # degrees of one Chebyshev polynomial, which is then fitted again to the smallest Ritz value


class Iterated(NamedTuple):
    """The factors of b tall matrices: A_r = long short^T, and what the next warm start needs."""

    long: Tensor  # (b, M, r)
    short: Tensor  # (b, N, r)
    basis: Tensor  # (b, N, kept) bf16, the last Ritz vectors in ascending order
    passes: list[int]
    converged: list[bool]


def cold_block(tall: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """(b, N, ``width``) orthonormal blocks near the top singular vectors, after two passes.

    All matrices start from one random block. ``generator`` draws its seed, which is 0 without one.
    """
    seed = 0
    if generator is not None:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    noise = ops.gaussian_sketch(1, tall.shape[2], width, seed=seed, device=tall.device)[0]
    image, _ = orthonormalized(image_of(tall, noise))
    return orthonormalized(product(tall.mT, image))[0]


def warm_block(bases: list[Tensor], device: torch.device) -> Tensor:
    """(b, N, l) orthonormal blocks from the bases (N, l) of earlier masks, which are rounded.

    An entry that is not finite counts as 0. The iteration finds out how good a start is.
    """
    block = torch.stack([basis.to(device).float() for basis in bases])
    return orthonormalized(block.nan_to_num_(0.0, 0.0, 0.0))[0]


def subspace_iteration(
    tall: Tensor, block: Tensor, rank: int, tolerance: float, max_degrees: int, *, kept: int, warm: bool = False
) -> Iterated:
    """Subspace iteration on A (b, M, N) from blocks (b, N, l), until the Ritz energies stall.

    A degree computes Y = A X, Z = A^T Y and X <- orth(2 ((2/a) Z - X) - X_previous). The first
    degree of a cycle takes X <- orth((2/a) Z - X). The polynomial is small on [0, a] and grows
    beyond it. a is the smallest Ritz value at the start of the cycle.

    The columns of a ``warm`` block are near its Ritz vectors, in ascending order. Their Rayleigh
    quotients take the place of the first Ritz values, which saves an eigenproblem and a rotation.
    Their error is of second order, and their sum is at most the Ritz energy, so no iteration stops
    too early. ``kept`` Ritz vectors are the basis for the next warm start.
    """
    previous: Tensor | None = None
    energy = torch.zeros(len(tall), device=tall.device)
    passes, converged = [0] * len(tall), [False] * len(tall)
    for degree in range(max_degrees + 1):
        image = image_of(tall, block)
        quotients = warm and degree == 0
        if quotients:
            values = squared_lengths(image)
        else:
            values, rotation = symmetric_eigen(product(image.mT, image))  # ascending Ritz values
        new = values[:, -rank:].sum(1)
        growth = (new - energy) / new.clamp_min(torch.finfo(new.dtype).tiny)
        energy = new
        done = (growth <= tolerance).tolist() if degree else [not (warm or e > 0) for e in new.tolist()]
        for i, stalled in enumerate(done):
            converged[i] = converged[i] or stalled
            passes[i] = passes[i] if converged[i] and not stalled else 2 * degree + 1
        if all(converged) or degree == max_degrees:
            break
        if previous is None:
            if not quotients:
                # With Ritz vectors as columns, scaling them takes out most of the condition number.
                block, image = product(block, rotation), product(image, rotation)
            edge = values.amin(1).clamp_min(1e-12 * values.amax(1) + torch.finfo(values.dtype).tiny)
        raised, status = ops.chebyshev_step_(product(tall.mT, image), block, previous, edge)
        block, previous = _repaired(raised, block, status)
        if degree % _CYCLE == _CYCLE - 1:
            previous = None
    vectors = exact_product(block, rotation[:, :, -kept:])
    short, basis = vectors[:, :, -rank:].contiguous(), vectors.to(torch.bfloat16)
    if image_is_coarse(tall):
        return Iterated(exact_product(tall, short), short, basis, [p + 1 for p in passes], converged)
    return Iterated(exact_product(image, rotation[:, :, -rank:]), short, basis, passes, converged)


def orthonormalized(block: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Orthonormalize the columns of ``block`` (b, n, l), n >= l, in place: block = Q R, block <- Q.

    ``other`` is multiplied by R^-1 from the right, in place. Where R is singular, Q comes from
    Householder QR and None comes back for ``other``: a recurrence that needs both starts again.
    """
    return _repaired(block, other, ops.cholesky_qr_(block, other))


def _repaired(block: Tensor, other: Tensor | None, status: Tensor) -> tuple[Tensor, Tensor | None]:
    """The blocks after a round of Cholesky-QR that ended with ``status``.

    Where one round was not enough, two more follow, and then Householder QR.
    """
    if bool(status.any()) and bool(ops.cholesky_qr_(block, other, rounds=2).any()):
        return torch.linalg.qr(block).Q.contiguous(), None
    return block, other


def image_of(tall: Tensor, block: Tensor) -> Tensor:
    """A X (b, M, l) in fp32, for A (b, M, N) and blocks X (b, N, l).

    bf16 matrices are multiplied as they are, with X as two bf16 terms. With one term the error of X
    reaches the Ritz values and vectors. Masks of trained matrices then lose 0.4 % of their entries
    on average, 4 % at worst (`bench.mask_rounding`).
    """
    return bf16_product(tall, block, terms=2) if tall.dtype == torch.bfloat16 else product(tall, block)


def image_is_coarse(tall: Tensor) -> bool:
    """Whether images have fewer digits than the factors need, as those in TF32."""
    return tall.is_cuda and tall.dtype == torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b within the iteration, in fp32.

    On GPUs fp32 is multiplied in TF32, whose error is smaller than the stopping tolerance. A bf16
    ``a`` takes ``b`` rounded to bf16. That is enough for A^T Y, of which no Ritz value is made.
    """
    if a.dtype == torch.bfloat16:
        return bf16_product(a, b)
    with matmul_precision(a, "tf32"):
        return a @ b


def squared_lengths(image: Tensor) -> Tensor:
    """(b, l) squared lengths of the columns of (b, M, l) images, as `product` would round them.

    TF32 may cut digits off, which lowers squares by up to 1e-3. Energies are compared to 3e-5, so
    all of them need the same error.
    """
    if image.is_cuda:
        return product(image.mT, image).diagonal(dim1=1, dim2=2)
    return image.square().sum(1)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the digits of fp32, whatever the user's setting. ``a`` may be bf16."""
    if a.dtype == torch.bfloat16:
        return bf16_product(a, b, terms=3)
    if not a.is_cuda:  # There is no setting; small products notice the time of the context.
        return a @ b
    with matmul_precision(a, "ieee"):
        return a @ b
