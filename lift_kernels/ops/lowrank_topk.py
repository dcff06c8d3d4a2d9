"""Selection of the k largest entries of a low-rank product, and of index lists from bitmaps."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, dispatch, reference, threshold_bracket
from .checks import check_bitmaps, check_topk
from .eager import skips_dispatcher


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
        # One by one: the drawn rows take much memory.
        drawn = [threshold_bracket.sampled(*pair, k) for pair in zip(left, right)]
        bracket = torch.stack(drawn) if drawn else left.new_empty(0, 2)
    if name == "triton":
        from .triton.lowrank_topk import lowrank_topk_counting, scan_products

        scanned = scan_products(left, right, k, bracket)
        indices, thresholds, status = bitmap_to_indices(*scanned, k, backend=backend)
        del scanned
        for i in status.nonzero().flatten().tolist():  # the one wait, unless a bracket failed
            indices[i], thresholds[i] = lowrank_topk_counting(left[i], right[i], k)
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
    if skips_dispatcher(bitmaps):
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
        from .triton.bitmap_to_indices import bitmap_to_indices_triton as implementation
    else:
        implementation = reference.bitmap_to_indices_ref if name == "reference" else cuda.bitmap_to_indices
    return implementation(bitmaps, candidates, counts, columns, k)
