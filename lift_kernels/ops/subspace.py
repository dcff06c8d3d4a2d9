"""The public ops of a refresh: schema, fake, argument checks and the choice of a backend, as in
`ops`. No kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import require
from . import cuda, dispatch, reference
from .checks import check_counter, check_edge, check_qr, check_sketch
from .eager import skips_dispatcher
from .precision import matmul_precision


def gaussian_sketch(
    matrices: int,
    rows: int,
    columns: int,
    *,
    seed: int,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Standard normal blocks (matrices, rows, columns), fp32 or bf16: the random start of a
    subspace iteration.

    A number is a function of (``seed``, matrix, position in it), up to rounding the same on every
    device, whatever the batch; ``first`` is the number of the first matrix. Raises ValueError for
    negative sizes, a seed outside 0..2^63-1 and other dtypes.
    """
    for label, size in (("matrices", matrices), ("rows", rows), ("columns", columns)):
        require(isinstance(size, int) and size >= 0, f"{label} must be an integer of at least 0, got {size!r}")
    check_counter(seed, first)
    block = torch.empty(matrices, rows, columns, dtype=dtype, device=device)
    torch.ops.lift_kernels.gaussian_sketch_(block, seed, first, backend=backend)
    return block


@torch.library.custom_op(
    "lift_kernels::gaussian_sketch_",
    mutates_args=("block",),
    schema="(Tensor(a!) block, int seed, int first=0, *, str? backend=None) -> ()",
)
def _gaussian_sketch_op(block, seed, first=0, *, backend=None):
    check_sketch(block, seed, first)
    if dispatch.choose(backend, block.device, "gaussian_sketch_") == "reference":
        return reference.gaussian_sketch_ref_(block, seed, first)
    cuda.native.gaussian_sketch_.default(block, seed, first)


@_gaussian_sketch_op.register_fake
def _(block, seed, first=0, *, backend=None):
    check_sketch(block, seed, first)


def cholesky_qr_(block: Tensor, other: Tensor | None = None, *, rounds: int = 1, backend: str | None = None) -> Tensor:
    """Orthonormalize the columns of tall blocks (b, n, l >= 1, n >= l), fp32 and contiguous, in
    place: block = Q R, block <- Q.

    ``other`` (b, any, l) gets the same R^-1 from the right. Cholesky-QR of the Gram matrix scaled
    to a unit diagonal; a second of two ``rounds`` brings the error of ill-conditioned blocks down
    to that of Householder QR.

    Returns (b,) int32 on the device, about the last round: 0, orthonormal; 1, deficient: a zero
    column or a breakdown, after which a shifted factor was applied: the same span, better
    conditioned, not orthonormal; 2, not finite, left as it is. Raises ValueError or TypeError for
    other shapes, dtypes and strides.
    """
    if skips_dispatcher(block):
        return _cholesky_qr(block, other, rounds, backend)
    return torch.ops.lift_kernels.cholesky_qr_(block, other, rounds=rounds, backend=backend)


@torch.library.custom_op(
    "lift_kernels::cholesky_qr_",
    mutates_args=("block", "other"),
    # No default for a written argument: torch 2.11 leaves it out of a call, and then looks for it
    # to bump its version.
    schema="(Tensor(a!) block, Tensor(b!)? other, *, int rounds=1, str? backend=None) -> Tensor",
)
def _cholesky_qr_op(block, other, *, rounds=1, backend=None):
    return _cholesky_qr(block, other, rounds, backend)


@_cholesky_qr_op.register_fake
def _(block, other, *, rounds=1, backend=None):
    check_qr(block, other, rounds)
    return block.new_empty(len(block), dtype=torch.int32)


def _cholesky_qr(block, other, rounds, backend):
    check_qr(block, other, rounds)
    name = dispatch.choose(backend, block.device, "cholesky_qr_")
    if name == "reference" or block.numel() == 0:
        with matmul_precision(block, "ieee"):
            return reference.cholesky_qr_ref_(block, other, rounds)
    torch.autograd.graph.increment_version([block] if other is None else [block, other])
    return cuda.cholesky_qr_(block, other, rounds)


def chebyshev_step_(
    product: Tensor, block: Tensor, previous: Tensor | None, edge: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The next block of a Chebyshev recurrence, orth(2 ((2/a) Z - X) - X_previous), and ``block`` X
    in its coordinates, in place.

    Args:
        product: Z = A^T A X, (b, n, l) fp32, contiguous. ``block``: X, ``previous``: X_previous, of
            the same shape; without a previous block orth((2/a) Z - X).
        edge: a, (b,) fp32, positive: the end of the interval [0, a] on which the polynomial stays
            small.

    Returns (next block, status) with the status of `cholesky_qr_`, of which this is one round; X is
    multiplied by its R^-1.
    """
    if skips_dispatcher(block):
        return _chebyshev_step(product, block, previous, edge, backend)
    return torch.ops.lift_kernels.chebyshev_step_(product, block, previous, edge, backend=backend)


@torch.library.custom_op(
    "lift_kernels::chebyshev_step_",
    mutates_args=("block",),
    schema="(Tensor product, Tensor(a!) block, Tensor? previous, Tensor edge, *, str? backend=None) -> (Tensor, "
    "Tensor)",
)
def _chebyshev_step_op(product, block, previous, edge, *, backend=None):
    return _chebyshev_step(product, block, previous, edge, backend)


@_chebyshev_step_op.register_fake
def _(product, block, previous, edge, *, backend=None):
    check_qr(block, product, 1)
    check_edge(product, block, previous, edge)
    return torch.empty_like(product), block.new_empty(len(block), dtype=torch.int32)


def _chebyshev_step(product, block, previous, edge, backend):
    check_qr(block, product, 1)
    check_edge(product, block, previous, edge)
    name = dispatch.choose(backend, block.device, "chebyshev_step_")
    if name == "reference" or block.numel() == 0:
        with matmul_precision(block, "ieee"):
            return reference.chebyshev_step_ref_(product, block, previous, edge)
    torch.autograd.graph.increment_version([block])
    return cuda.chebyshev_step_(product, block, previous, edge)
