"""The largest entries of a low-rank product that never lies in memory.

Each pass over the product computes its tiles again. Magnitudes are compared as *keys*: the fp32
pattern without its sign, a non-negative int32. So -0 equals 0, NaN comes above infinity, and the
order is total. Selected entries are bits of a bitmap (m, ceil(n / 32)) int32. Each row starts a new
word, so that no two tiles share one. Atomics add and "or" integers only, so their order changes no
result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bitmap_to_indices import list_bits, popcount, set_bits
from .targets import lowrank_options, target_of


@triton.jit
def _tile_keys(
    left,
    right,
    m,
    n,
    r,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the (ROWS, COLUMNS) int32 keys of left @ right.T from (row, column) on.

    Outside of the product they are -1, below every limit. All passes over the product call this
    with the same shapes, so that they see the same bits.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left += row.to(tl.int64) * r
    right += column.to(tl.int64) * r
    # Behind the last row or column, the last one is loaded again.
    x = tl.minimum(rows, m - row - 1)[:, None] * r + depth[None, :]
    y = tl.minimum(columns, n - column - 1)[:, None] * r + depth[None, :]
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, r, DEPTH):
        inside = (start + depth < r)[None, :]
        a = tl.load(left + (x + start), mask=inside, other=0.0)
        b = tl.load(right + (y + start), mask=inside, other=0.0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    keys = product.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where((rows < m - row)[:, None] & (columns < n - column)[None, :], keys, -1)


@triton.jit
def _tile_corner(m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's matrix, and the first row and column of its tile.

    Neighbors share their rows of the left factor.
    """
    across = tl.cdiv(n, COLUMNS)
    tiles = tl.cdiv(m, ROWS) * across
    tile = tl.program_id(0) % tiles
    return (tl.program_id(0) // tiles).to(tl.int64), tile // across * ROWS, tile % across * COLUMNS


@triton.jit
def _load_limits(bracket):
    """Return the lowest and highest key of a bracket (2,), fp32 patterns as int32.

    Negative limits count as zero.
    """
    return tl.maximum(tl.load(bracket), 0), tl.maximum(tl.load(bracket + 1), 0)


@triton.jit
def _pack_words(flags, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Pack (ROWS, WORDS, 32) booleans into (ROWS, WORDS) uint32, lowest bit first."""
    return tl.sum(flags.to(tl.uint32) << tl.arange(0, 32).to(tl.uint32)[None, None, :], axis=2)


@triton.jit(do_not_specialize=["m", "n", "capacity"])
def _lowrank_topk_kernel(
    left,  # (b, m, r) fp32
    right,  # (b, n, r) fp32
    m,
    n,
    r,
    bracket,  # (b, 2) int32 patterns of the limits
    bitmap,  # (b, m, words) int32: keys above the bracket
    ties,  # (b, m, words) int32: keys inside it, or None
    candidates,  # (b, capacity) int64: key << 32 | (LAST - position) of those inside, in any order, or None
    capacity,
    counts,  # (b, 2) int32, zero-filled: keys above, keys inside
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mark what is surely selected in one pass over the product, and note what may be."""
    WORDS: tl.constexpr = COLUMNS // 32
    matrix, row, column = _tile_corner(m, n, ROWS, COLUMNS)
    left += matrix * m * r
    right += matrix * n * r
    keys = _tile_keys(left, right, m, n, r, row, column, ROWS, COLUMNS, DEPTH, PRECISION)
    keys = tl.reshape(keys, [ROWS, WORDS, 32])
    low, high = _load_limits(bracket + 2 * matrix)

    rows = row + tl.arange(0, ROWS)
    word = column // 32 + tl.arange(0, WORDS)
    width = tl.cdiv(n, 32)
    place = matrix * m * width + rows[:, None] * width + word[None, :]
    inside = (rows < m)[:, None] & (word < width)[None, :]
    above = _pack_words(keys > high, ROWS, WORDS)
    tl.store(bitmap + place, above, mask=inside)
    definite = tl.sum(popcount(above))
    if definite > 0:
        tl.atomic_add(counts + 2 * matrix, definite, sem="relaxed")

    near = _pack_words((keys >= low) & (keys <= high), ROWS, WORDS)
    if ties is not None:
        tl.store(ties + place, near, mask=inside)
    near_bits = popcount(near)
    total = tl.sum(near_bits)
    if total > 0:
        base = tl.atomic_add(counts + 2 * matrix + 1, total, sem="relaxed")
        if candidates is not None:
            candidates += matrix * capacity
            if base < capacity:
                flat = tl.reshape(near_bits, [ROWS * WORDS])
                slot = base + tl.reshape(tl.cumsum(flat, axis=0) - flat, [ROWS, WORDS])
                position = rows[:, None] * n + word[None, :] * 32
                lane = tl.arange(0, 32)[None, None, :]
                for _ in range(tl.max(flat)):  # the lowest bit of every word, then the next
                    rest = near & (near - 1)
                    bit = popcount((near ^ rest) - 1)
                    key = tl.sum(tl.where(lane == bit[:, :, None], keys, 0), axis=2)
                    note = (key.to(tl.int64) << 32) | (0x7FFFFFFF - position - bit)
                    tl.store(candidates + slot, note, mask=(near != 0) & (slot < capacity))
                    near = rest
                    slot += 1


@triton.jit(do_not_specialize=["m", "n", "shift"])
def _lowrank_histogram_kernel(
    left,  # (m, r) fp32
    right,  # (n, r) fp32
    m,
    n,
    r,
    bracket,  # (2,) int32 patterns of the limits
    histogram,  # (bins,) int32, zero-filled
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """histogram[(key - low) >> shift] += 1 for every key in the bracket."""
    _, row, column = _tile_corner(m, n, ROWS, COLUMNS)
    keys = _tile_keys(left, right, m, n, r, row, column, ROWS, COLUMNS, DEPTH, PRECISION)
    low, high = _load_limits(bracket)
    distance = (keys - low).to(tl.uint32, bitcast=True)  # a key below wraps around to far above
    tl.atomic_add(histogram + (distance >> shift), 1, mask=distance <= high - low, sem="relaxed")


def scan_products(left: Tensor, right: Tensor, k: int, bracket: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Scan ``left @ right.mT`` once and return the arguments of `bitmap_to_indices`.

    Nothing waits for the device.

    Args:
        left: (b, m, r) fp32, contiguous.
        right: (b, n, r) fp32, contiguous.
        k: entries to select per matrix.
        bracket: (b, 2) fp32, limits, inclusive, between which the k-th magnitude is expected.

    Returns:
        Bitmaps, candidates, counts, and the columns of the bitmaps. Candidates beyond
        max(4096, k / 2) are counted but not kept.
    """
    left, right = _filling_words(left, right)
    (batch, m, _), n = left.shape, right.shape[1]
    with torch.cuda.device_of(left):
        bitmaps = torch.empty(batch, m, triton.cdiv(n, 32), dtype=torch.int32, device=left.device)
        candidates = torch.empty(batch, max(4096, k // 2), dtype=torch.int64, device=left.device)
        counts = _scan(left, right, bracket.view(torch.int32), bitmaps, candidates=candidates)
    return bitmaps, candidates, counts, n


def lowrank_topk_counting(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the positions (k,) and the k-th magnitude of one matrix without a bracket.

    Two more passes count its keys. Scratch memory: two bitmaps, a histogram and up to k ties.

    Args:
        left: (m, r) fp32, contiguous.
        right: (n, r) fp32, contiguous.
        k: entries to select.
    """
    left, right = _filling_words(left[None], right[None])
    m, n = left.shape[1], right.shape[1]
    with torch.cuda.device_of(left):
        threshold = _kth_key(left, right, k)
        bitmap, ties = torch.empty(2, 1, m, triton.cdiv(n, 32), dtype=torch.int32, device=left.device)
        definite, near = _scan(left, right, torch.stack([threshold, threshold]), bitmap, ties=ties)[0].tolist()
        assert definite < k <= definite + near, "two passes over the same product disagree"
        set_bits(bitmap, list_bits(ties, k - definite, n)[0], n)
        return list_bits(bitmap, k, n)[0][0], threshold.view(torch.float32)


def _filling_words(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same flat product whose rows fill words of a bitmap.

    A product with one column is transposed. A column and a row have the same flat positions.
    """
    return (right, left) if right.shape[1] == 1 else (left, right)


def _scan(
    left: Tensor,
    right: Tensor,
    bracket: Tensor,
    bitmaps: Tensor,
    *,
    ties: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """Mark keys above the bracket in ``bitmaps``, and keep those inside it.

    Keys inside are kept as ``ties`` or ``candidates``. Returns (b, 2) counts of both kinds.
    """
    counts = torch.zeros(len(left), 2, dtype=torch.int32, device=left.device)
    capacity = 0 if candidates is None else candidates.shape[1]
    if len(left):
        _launch_tiles(_lowrank_topk_kernel, left, right, bracket, bitmaps, ties, candidates, capacity, counts)
    return counts


def _kth_key(left: Tensor, right: Tensor, k: int) -> Tensor:
    """Return the k-th largest key of one matrix, 0-dim int32.

    It takes a histogram of the high 15 bits and one of the low 16.
    """
    low = torch.zeros((), dtype=torch.int32, device=left.device)
    rank: int | Tensor = k
    for bits, shift in ((15, 16), (16, 0)):
        histogram = torch.zeros(1 << bits, dtype=torch.int32, device=left.device)
        bracket = torch.stack([low, low + ((1 << (bits + shift)) - 1)])
        _launch_tiles(_lowrank_histogram_kernel, left, right, bracket, histogram, shift)
        keys = histogram.flip(0).cumsum(0)  # from the top down to each bin
        above = keys < rank
        rank = rank - (keys * above).amax()
        low = low + (((1 << bits) - 1 - above.sum()).int() << shift)
    return low


def _launch_tiles(kernel, left: Tensor, right: Tensor, *arguments) -> None:
    """Run a kernel with one program per tile of each product."""
    (batch, m, r), n = left.shape, right.shape[1]
    histogram = kernel is _lowrank_histogram_kernel
    options = lowrank_options(target_of(left.device), wide=r % 32 == 0, histogram=histogram)
    grid = (batch * triton.cdiv(m, options["ROWS"]) * triton.cdiv(n, options["COLUMNS"]),)
    kernel[grid](left, right, m, n, r, *arguments, **options)
