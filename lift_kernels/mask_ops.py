"""The public ops of a refresh: schema, fake, argument checks and the choice of a backend, as in
`ops`. No kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import bracket as brackets
from . import dispatch, native_cuda, reference
from .checks import check_bitmaps, check_counter, check_edge, check_qr, check_sketch, check_topk, require
from .precision import matmul_precision


def lowrank_topk(
    left: Tensor, right: Tensor, k: int, *, bracket: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest |W_r|, W_r = left right^T, without the product: sorted flat int32 positions
    (k,) and the k-th magnitude.

    Args:
        left, right: (m, r) and (n, r) fp32 contiguous factors, m * n < 2^31; or batches (b, m, r)
            and (b, n, r) of them, whose results are (b, k) and (b,).
        bracket: (2,) or (b, 2) fp32 interval expected to hold the k-th magnitude, then one sweep
            over tiles of the product does it; by default drawn entries say where. A wrong one costs
            three more sweeps, never a wrong answer.

    Magnitudes compare by their fp32 bits without the sign, so 0 = -0 and NaN is largest; ties go to
    the lower position. On a GPU the host waits once for a batch, and twice for each wrong bracket
    in it.
    """
    return torch.ops.lift_kernels.lowrank_topk(left, right, k, bracket, backend=backend)


@torch.library.custom_op(
    "lift_kernels::lowrank_topk",
    mutates_args=(),
    schema="(Tensor left, Tensor right, int k, Tensor? bracket=None, *, str? backend=None) -> (Tensor, Tensor)",
)
def _lowrank_topk_op(left, right, k, bracket=None, *, backend=None):
    check_topk(left, right, k, bracket)
    if left.dim() == 2:
        one = None if bracket is None else bracket[None]
        indices, thresholds = _lowrank_topk(left[None], right[None], k, one, backend)
        return indices[0], thresholds[0]
    return _lowrank_topk(left, right, k, bracket, backend)


@_lowrank_topk_op.register_fake
def _(left, right, k, bracket=None, *, backend=None):
    check_topk(left, right, k, bracket)
    batch = left.shape[:-2]
    return left.new_empty(*batch, k, dtype=torch.int32), left.new_empty(batch)


def _lowrank_topk(left, right, k, bracket, backend):
    name = dispatch.choose(backend, left.device, "lowrank_topk")
    if bracket is None and name != "reference":
        drawn = [brackets.sampled(*pair, k) for pair in zip(left, right)]  # one by one: the drawn rows take much memory
        bracket = torch.stack(drawn) if drawn else left.new_empty(0, 2)
    if name == "triton":
        from .triton_kernels import select

        scanned = select.scan_products(left, right, k, bracket)
        indices, thresholds, status = bitmap_to_indices(*scanned, k, backend=backend)
        del scanned
        for i in status.nonzero().flatten().tolist():  # the one wait, unless a bracket failed
            indices[i], thresholds[i] = select.lowrank_topk_counting(left[i], right[i], k)
        return indices, thresholds
    indices = left.new_empty(len(left), k, dtype=torch.int32)
    thresholds = left.new_empty(len(left))
    for i, (one, other) in enumerate(zip(left, right)):
        if name == "reference":
            indices[i], thresholds[i] = reference.lowrank_topk_ref(one, other, k)
        else:
            low, high = bracket[i].tolist()
            thresholds[i] = torch.ops.lift_kernels_native.lowrank_topk.default(one, other, low, high, indices[i])
    return indices, thresholds


def bitmap_to_indices(
    bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Selections of many m x n matrices as sorted index lists: the bits set, and as many of the
    largest candidates as make k.

    Args:
        bitmaps: (b, m, ceil(n / 32)) int32; bit j of word w in row i: position i * n + 32 w + j is
            surely chosen. Bits behind the last column do not count.
        candidates: (b, capacity) int64, ``key << 32 | (2^31 - 1 - position)`` in any order; key:
            the fp32 pattern of a magnitude. So NaN is largest, and ties go to the lower position.
        counts: (b, 2) int32: bits set, and candidates, of which the first so many are read.
        columns: n. k: 1 to m * n.

    All contiguous, on one device; none is changed. Returns indices (b, k) int32, the k-th
    magnitudes (b,) fp32, and status (b,) int32: 0, or 1 where the candidates do not hold the k-th
    magnitude (too many bits, too few candidates, more than the capacity, or places named twice):
    all indices -1, the magnitude NaN. Never waits for the device, but for the reference backend.
    Raises ValueError or TypeError for other shapes, dtypes and strides.
    """
    if _is_plain(bitmaps):
        return _bitmap_to_indices(bitmaps, candidates, counts, columns, k, backend)
    return torch.ops.lift_kernels.bitmap_to_indices(bitmaps, candidates, counts, columns, k, backend=backend)


@torch.library.custom_op(
    "lift_kernels::bitmap_to_indices",
    mutates_args=(),
    schema="(Tensor bitmaps, Tensor candidates, Tensor counts, int columns, int k, *, str? backend=None) "
    "-> (Tensor, Tensor, Tensor)",
)
def _bitmap_to_indices_op(bitmaps, candidates, counts, columns, k, *, backend=None):
    return _bitmap_to_indices(bitmaps, candidates, counts, columns, k, backend)


@_bitmap_to_indices_op.register_fake
def _(bitmaps, candidates, counts, columns, k, *, backend=None):
    check_bitmaps(bitmaps, candidates, counts, columns, k)
    batch = len(bitmaps)
    return bitmaps.new_empty(batch, k), bitmaps.new_empty(batch, dtype=torch.float32), bitmaps.new_empty(batch)


def _bitmap_to_indices(bitmaps, candidates, counts, columns, k, backend):
    check_bitmaps(bitmaps, candidates, counts, columns, k)
    name = dispatch.choose(backend, bitmaps.device, "bitmap_to_indices")
    if name == "triton":
        from .triton_kernels.bitmap import bitmap_to_indices_triton as way
    else:
        way = reference.bitmap_to_indices_ref if name == "reference" else native_cuda.bitmap_to_indices
    return way(bitmaps, candidates, counts, columns, k)


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
    native_cuda.native.gaussian_sketch_.default(block, seed, first)


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
    if _is_plain(block):
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
    return native_cuda.cholesky_qr_(block, other, rounds)


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
    if _is_plain(block):
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
    return native_cuda.chebyshev_step_(product, block, previous, edge)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a call may pass by the dispatcher: nothing is recorded or traced, and a small block
    waits 0.1 ms for its layers.
    """
    quiet = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return quiet and type(tensor) is Tensor and not tensor.is_meta
