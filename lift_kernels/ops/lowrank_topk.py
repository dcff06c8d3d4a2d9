"""Public ops that select the largest entries of a low-rank product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import cuda, dispatch, reference, threshold_bracket
from .checks import check_bitmaps, check_topk
from .eager import skips_dispatcher


def lowrank_topk(
    left: Tensor, right: Tensor, k: int, *, bracket: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of |left right^T|.

    For factors of a low-rank approximation W_r these are the principal weights of LIFT (arXiv
    2506.00772, section 3). Only the reference backend forms the product. Magnitudes are compared by
    their fp32 bits without the sign, so 0 equals -0 and NaN is largest. Ties go to the lower
    position.

    Args:
        left: (m, r) float32, contiguous, or a batch (b, m, r).
        right: (n, r) or (b, n, r), likewise, with m * n < 2^31.
        k: entries to select per matrix, 1 to m * n.
        bracket: (2,) or (b, 2) float32, contiguous, an interval that is expected to hold the k-th
            magnitude. Then one sweep over tiles of the product is enough. A wrong interval costs
            three more sweeps, never a wrong result. None estimates the interval from sampled
            entries.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        Sorted flat positions, (k,) or (b, k) int32, and the k-th magnitude, 0-dim or (b,) float32.
        On a GPU the host waits once per batch, and twice for each wrong bracket.

    Raises:
        ValueError: an argument has a wrong shape, dtype, layout or device, or k is out of range.
        RuntimeError: the backend cannot run here.
    """
    if skips_dispatcher(left, right):
        return _lowrank_topk(left, right, k, bracket, backend)
    return torch.ops.lift_kernels.lowrank_topk(left, right, k, bracket, backend=backend)


@torch.library.custom_op(
    "lift_kernels::lowrank_topk",
    mutates_args=(),
    schema="(Tensor left, Tensor right, int k, Tensor? bracket=None, *, str? backend=None) -> (Tensor, Tensor)",
)
def _lowrank_topk_op(left, right, k, bracket=None, *, backend=None):
    return _lowrank_topk(left, right, k, bracket, backend)


@_lowrank_topk_op.register_fake
def _(left, right, k, bracket=None, *, backend=None):
    check_topk(left, right, k, bracket)
    batch = left.shape[:-2]
    return left.new_empty(*batch, k, dtype=torch.int32), left.new_empty(batch)


def _lowrank_topk(left, right, k, bracket, backend):
    check_topk(left, right, k, bracket)
    name = dispatch.choose(backend, left.device, "lowrank_topk")
    if name == "native-cpu" and left.dim() == 2:
        return _native(left, right, k, bracket)
    if left.dim() == 2:
        one = None if bracket is None else bracket[None]
        indices, thresholds = _batch(left[None], right[None], k, one, name, backend)
        return indices[0], thresholds[0]
    return _batch(left, right, k, bracket, name, backend)


def _batch(left, right, k, bracket, name, backend):
    if name == "triton":
        from .triton.lowrank_topk import lowrank_topk_counting, scan_products

        if bracket is None:  # One matrix at a time, because the sampled rows take much memory.
            drawn = [threshold_bracket.sampled(*pair, k) for pair in zip(left, right)]
            bracket = torch.stack(drawn) if drawn else left.new_empty(0, 2)
        scanned = scan_products(left, right, k, bracket)
        indices, thresholds, status = bitmap_to_indices(*scanned, k, backend=backend)
        del scanned
        for i in status.nonzero().flatten().tolist():  # the only wait, unless a bracket failed
            indices[i], thresholds[i] = lowrank_topk_counting(left[i], right[i], k)
        return indices, thresholds
    indices = left.new_empty(len(left), k, dtype=torch.int32)
    thresholds = left.new_empty(len(left))
    for i, (one, other) in enumerate(zip(left, right)):
        if name == "reference":
            indices[i], thresholds[i] = reference.lowrank_topk_ref(one, other, k)
        else:
            indices[i], thresholds[i] = _native(one, other, k, None if bracket is None else bracket[i])
    return indices, thresholds


def _native(left, right, k, bracket):
    """One matrix by the C++ op, which draws a bracket of its own where NaN stands for it."""
    low, high = (math.nan, math.nan) if bracket is None else bracket.tolist()
    indices = torch.empty(k, dtype=torch.int32)
    threshold = torch.ops.lift_kernels_native.lowrank_topk.default(left, right, low, high, indices)
    return indices, torch.scalar_tensor(threshold, dtype=torch.float32)  # cheaper than torch.tensor


def bitmap_to_indices(
    bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn bitmaps of selected entries, for b matrices of m x n, into sorted index lists.

    Each list holds the positions of all set bits and of as many of the largest candidates as make
    k. No argument is changed. Only the reference backend waits for the device.

    Args:
        bitmaps: (b, m, ceil(n / 32)) int32, contiguous. Bit j of word w in row i says that position
            i * n + 32 w + j is selected. Bits behind the last column do not count.
        candidates: (b, capacity) int64, contiguous, in any order, each ``key << 32 | (2^31 - 1 -
            position)``. The key is the fp32 pattern of a magnitude. So NaN is largest, and ties go
            to the lower position.
        counts: (b, 2) int32, contiguous: the number of set bits, and the number of candidates to
            read.
        columns: n.
        k: entries to select per matrix, 1 to m * n.
        backend: name of a backend, see `lift_kernels.backends`. None takes the fastest usable one.

    Returns:
        Indices (b, k) int32, the k-th magnitudes (b,) float32, and status (b,) int32. Status is 1
        where the candidates do not hold the k-th magnitude, otherwise 0. The causes are too many
        bits, too few candidates, more candidates than the capacity, or positions named twice. There
        all indices are -1 and the magnitude is NaN.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: an argument has a wrong shape, layout or device, or k is out of range.
        RuntimeError: the backend cannot run here.
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
