"""Public ops of the subspace iteration behind a refresh.

`lift_kernels.ops` describes what all ops have in common.
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
    """Draw standard normal blocks, the random start of a subspace iteration.

    A number is a function of ``seed``, the number of its matrix and its position in it. Up to
    rounding it is the same on every device and in every batch. The generator is Philox4x32-10
    (Salmon et al. 2011).

    Args:
        matrices: number of blocks.
        rows: of each block.
        columns: of each block.
        seed: 0 to 2^63-1.
        first: number of the first matrix, 0 to 2^63-1.
        dtype: float32 or bfloat16.
        device: where the blocks are made.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        (matrices, rows, columns) tensor of ``dtype``.

    Raises:
        TypeError: the dtype is not supported.
        ValueError: a size is negative, or ``seed`` or ``first`` is out of range.
        RuntimeError: the backend cannot run here.
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
    """Orthonormalize the columns of tall blocks in place: block = Q R, block <- Q.

    Each round is a Cholesky-QR of the Gram matrix, scaled to a unit diagonal. A second round brings
    the error of ill-conditioned blocks down to that of Householder QR.

    Args:
        block: (b, n, l) float32, contiguous, with n >= l >= 1.
        other: (b, any, l) float32, contiguous, which is multiplied by the same R^-1 from the right,
            in place.
        rounds: 1 or 2.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        Status (b,) int32 of the last round, on the device of ``block``.

        - 0: the columns are orthonormal.
        - 1: the block was deficient, with a zero column or a breakdown. After a breakdown a shifted
          factor was applied. The columns have the same span and are better conditioned, but they
          are not orthonormal.
        - 2: the block is not finite and was left as it is.

    Raises:
        TypeError: a dtype is not float32.
        ValueError: an argument has a wrong shape, layout or device.
        RuntimeError: the backend cannot run here.
    """
    if skips_dispatcher(block):
        return _cholesky_qr(block, other, rounds, backend)
    return torch.ops.lift_kernels.cholesky_qr_(block, other, rounds=rounds, backend=backend)


@torch.library.custom_op(
    "lift_kernels::cholesky_qr_",
    mutates_args=("block", "other"),
    # `other` has no default because it is written. torch 2.11 leaves a default argument out of the
    # call, and then looks for it to bump its version.
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
    """Advance a Chebyshev recurrence by one step: orth(2 ((2/a) Z - X) - X_previous).

    ``block`` is multiplied by the same R^-1 in place, because the recurrence needs both blocks in
    one coordinate system. The orthonormalization is one round of `cholesky_qr_`.

    Args:
        product: Z = A^T A X, (b, n, l) float32, contiguous, with n >= l >= 1.
        block: X, of the same form.
        previous: X_previous, of the same form. None makes the first step, orth((2/a) Z - X).
        edge: a, (b,) float32, contiguous and positive. The polynomial stays small on [0, a].
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        The next block (b, n, l) float32, and the status of `cholesky_qr_`.

    Raises:
        TypeError: ``product`` or ``block`` is not float32.
        ValueError: an argument has a wrong shape, layout or device.
        RuntimeError: the backend cannot run here.
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
