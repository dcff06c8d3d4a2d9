"""The largest entries of a low-rank product, chosen while its tiles are recomputed: it never lies in memory.

Magnitudes are compared as keys: the fp32 pattern without its sign, a non-negative int32. So -0 equals 0, NaN comes
above infinity, and the order is total. Chosen entries are bits of a bitmap (m, ceil(n / 32)) int32: each row starts a
word of its own, so that no two tiles share one. Atomics add and "or" integers only: their order changes no result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import load_stream

# TF32 products of split factors, three for one: the error of fp32 at the speed of tensor cores.
TILE = {"ROWS": 128, "COLUMNS": 64, "DEPTH": 16, "PRECISION": "tf32x3"}
# Two programs fit on a multiprocessor, so that one multiplies while the other selects.
TILE_OPTIONS = {"num_warps": 8, "num_stages": 2, "maxnreg": 128, "enable_fp_fusion": False}
BLOCK = 1024
LAST = 0x7FFFFFFF


@triton.jit
def _popcount(x):
    """Bits set in each uint32, as int32; the compiler knows this idiom and makes one instruction of it."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _tile_keys(left, right, m, n, r, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """(ROWS, COLUMNS) int32 keys of left @ right.T from (row, column) on; -1, below every limit, outside of it.

    All passes over the product come here with the same shapes, so that they see the same bits.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left += row.to(tl.int64) * r
    right += column.to(tl.int64) * r
    x = tl.minimum(rows, m - row - 1)[:, None] * r + depth[None, :]  # behind the last row it stands in for them
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
def _tile_corner(n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column where this program's tile begins; neighbours share their rows of the left factor."""
    tiles = tl.cdiv(n, COLUMNS)
    return tl.program_id(0) // tiles * ROWS, tl.program_id(0) % tiles * COLUMNS


@triton.jit
def _load_limits(bracket):
    """Lowest and highest key of a bracket (2,), fp32 patterns as int32; what is negative counts as zero."""
    return tl.maximum(tl.load(bracket), 0), tl.maximum(tl.load(bracket + 1), 0)


@triton.jit
def _pack_words(flags, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """(ROWS, WORDS, 32) booleans as (ROWS, WORDS) uint32, the first one in the lowest bit."""
    return tl.sum(flags.to(tl.uint32) << tl.arange(0, 32).to(tl.uint32)[None, None, :], axis=2)


@triton.jit(do_not_specialize=["m", "n", "capacity"])
def _lowrank_topk_kernel(
    left,  # (m, r) fp32
    right,  # (n, r) fp32
    m,
    n,
    r,
    bracket,  # (2,) int32 patterns of the limits
    bitmap,  # (m, words) int32: keys above the bracket
    ties,  # (m, words) int32: keys inside it; or None
    candidates,  # (capacity,) int64: key << 32 | (LAST - position) of those inside, in any order; or None
    capacity,
    counts,  # (2,) int32, zeros before: keys above, keys inside
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass over the product: a bit for what is surely chosen, a note of what may be."""
    WORDS: tl.constexpr = COLUMNS // 32
    row, column = _tile_corner(n, ROWS, COLUMNS)
    keys = _tile_keys(left, right, m, n, r, row, column, ROWS, COLUMNS, DEPTH, PRECISION)
    keys = tl.reshape(keys, [ROWS, WORDS, 32])
    low, high = _load_limits(bracket)

    rows = row + tl.arange(0, ROWS)
    word = column // 32 + tl.arange(0, WORDS)
    width = tl.cdiv(n, 32)
    place = rows[:, None] * width + word[None, :]
    inside = (rows < m)[:, None] & (word < width)[None, :]
    above = _pack_words(keys > high, ROWS, WORDS)
    near = _pack_words((keys >= low) & (keys <= high), ROWS, WORDS)
    tl.store(bitmap + place, above, mask=inside)
    if ties is not None:
        tl.store(ties + place, near, mask=inside)

    definite = tl.sum(_popcount(above))
    if definite > 0:
        tl.atomic_add(counts, definite, sem="relaxed")
    near_bits = _popcount(near)
    total = tl.sum(near_bits)
    if total > 0:
        base = tl.atomic_add(counts + 1, total, sem="relaxed")
        if candidates is not None:
            if base < capacity:
                flat = tl.reshape(near_bits, [ROWS * WORDS])
                slot = base + tl.reshape(tl.cumsum(flat, axis=0) - flat, [ROWS, WORDS])
                position = rows[:, None] * n + word[None, :] * 32
                lane = tl.arange(0, 32)[None, None, :]
                for _ in range(tl.max(flat)):  # the lowest bit of every word, then the next
                    rest = near & (near - 1)
                    bit = _popcount((near ^ rest) - 1)
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
    histogram,  # (bins,) int32, zeros before
    shift,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """histogram[(key - low) >> shift] += 1 for every key in the bracket."""
    row, column = _tile_corner(n, ROWS, COLUMNS)
    keys = _tile_keys(left, right, m, n, r, row, column, ROWS, COLUMNS, DEPTH, PRECISION)
    low, high = _load_limits(bracket)
    distance = (keys - low).to(tl.uint32, bitcast=True)  # what is below wraps round to far above
    tl.atomic_add(histogram + (distance >> shift), 1, mask=distance <= high - low, sem="relaxed")


@triton.jit(do_not_specialize=["count", "n"])
def _set_bits_kernel(bitmap, positions, count, n, BLOCK: tl.constexpr):
    """Set the bits of ``positions`` (count,) int32, flat in a matrix of ``n`` columns."""
    start = tl.program_id(0) * BLOCK
    position = load_stream(positions + start, count - start, BLOCK)
    word = position // n * tl.cdiv(n, 32) + position % n // 32
    bit = (1 << (position % n % 32).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(bitmap + word, bit, mask=tl.arange(0, BLOCK) < count - start, sem="relaxed")


@triton.jit(do_not_specialize=["length"])
def _count_bits_kernel(bitmap, totals, length, BLOCK: tl.constexpr):
    """totals[program] = bits set in its block of the ``length`` words."""
    start = tl.program_id(0) * BLOCK
    words = load_stream(bitmap + start, length - start, BLOCK).to(tl.uint32)
    tl.store(totals + tl.program_id(0), tl.sum(_popcount(words)))


@triton.jit(do_not_specialize=["length", "count", "n"])
def _list_bits_kernel(bitmap, ends, out, length, count, n, BLOCK: tl.constexpr):
    """Write the flat positions of the first ``count`` bits set, in order; ``ends``: bits set up to each block's end."""
    start = tl.program_id(0) * BLOCK
    words = load_stream(bitmap + start, length - start, BLOCK).to(tl.uint32)
    bits = _popcount(words)
    place = tl.load(ends + tl.program_id(0)) - tl.sum(bits) + tl.cumsum(bits, axis=0) - bits
    word = start + tl.arange(0, BLOCK)
    width = tl.cdiv(n, 32)
    position = word // width * n + word % width * 32
    for _ in range(tl.max(bits)):  # the lowest bit of every word, then the next
        rest = words & (words - 1)
        tl.store(out + place, position + _popcount((words ^ rest) - 1), mask=(words != 0) & (place < count))
        words = rest
        place += 1


def lowrank_topk_triton(left: Tensor, right: Tensor, k: int, bracket: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest |left @ right.T|: sorted flat positions (k,) int32, and the k-th magnitude, () fp32.

    ``left`` (m, r) and ``right`` (n, r) fp32, contiguous. ``bracket`` (2,) fp32: limits, included, of where the k-th
    magnitude is expected; when it is not there, or too many are, the keys are counted in two more passes. Ties go to
    the lower position. Scratch: a bitmap and max(4096, k / 2) candidates, or two bitmaps, a histogram and up to k ties.
    """
    if right.shape[0] == 1:
        left, right = right, left  # a column lies flat as a row does, but a row fills its words
    n = right.shape[0]
    with torch.cuda.device_of(left):
        bitmap = torch.empty(left.shape[0], triton.cdiv(n, 32), dtype=torch.int32, device=left.device)
        candidates = torch.empty(max(4096, k // 2), dtype=torch.int64, device=left.device)
        # The one wait for the device, unless the bracket fails.
        definite, near = _scan(left, right, bracket.view(torch.int32), bitmap, candidates=candidates).tolist()
        if definite < k <= definite + near and near <= candidates.numel():
            chosen = candidates[:near].topk(k - definite, sorted=False).values
            threshold = (chosen.amin() >> 32).int()
            positions = (chosen & LAST).int() ^ LAST
        else:
            del candidates
            threshold = _kth_key(left, right, k)
            ties = torch.empty_like(bitmap)
            definite, near = _scan(left, right, torch.stack([threshold, threshold]), bitmap, ties=ties).tolist()
            assert definite < k <= definite + near, "two passes over the same product disagree"
            positions = _list_bits(ties, k - definite, n)
        _set_bits(bitmap, positions, n)
        return _list_bits(bitmap, k, n), threshold.view(torch.float32)


def _scan(
    left: Tensor, right: Tensor, bracket: Tensor, bitmap: Tensor, *, ties: Tensor | None = None, candidates: Tensor | None = None
) -> Tensor:
    """Mark keys above the bracket in ``bitmap``, keep those in it as ``ties`` or ``candidates``; (2,) counts of both."""
    counts = torch.zeros(2, dtype=torch.int32, device=left.device)
    capacity = 0 if candidates is None else candidates.numel()
    _launch_tiles(_lowrank_topk_kernel, left, right, bracket, bitmap, ties, candidates, capacity, counts)
    return counts


def _kth_key(left: Tensor, right: Tensor, k: int) -> Tensor:
    """The k-th largest key, () int32, by a histogram of the high 15 bits and one of the low 16."""
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


def _set_bits(bitmap: Tensor, positions: Tensor, n: int) -> None:
    """Set the bits of flat ``positions`` (count,) int32 of a matrix with ``n`` columns."""
    count = positions.numel()
    _set_bits_kernel[(triton.cdiv(count, BLOCK),)](bitmap, positions, count, n, BLOCK=BLOCK, num_warps=4)


def _list_bits(bitmap: Tensor, count: int, n: int) -> Tensor:
    """(count,) int32: flat positions of the first bits set in the bitmap of a matrix with ``n`` columns."""
    length = bitmap.numel()
    grid = (triton.cdiv(length, BLOCK),)
    totals = torch.empty(grid, dtype=torch.int32, device=bitmap.device)
    _count_bits_kernel[grid](bitmap, totals, length, BLOCK=BLOCK, num_warps=4)
    out = torch.empty(count, dtype=torch.int32, device=bitmap.device)
    ends = totals.cumsum(0, dtype=torch.int32)
    _list_bits_kernel[grid](bitmap, ends, out, length, count, n, BLOCK=BLOCK, num_warps=4)
    return out


def _launch_tiles(kernel, left: Tensor, right: Tensor, *arguments) -> None:
    """Run a kernel with one program per tile of the product."""
    (m, r), n = left.shape, right.shape[0]
    grid = (triton.cdiv(m, TILE["ROWS"]) * triton.cdiv(n, TILE["COLUMNS"]),)
    kernel[grid](left, right, m, n, r, *arguments, **TILE, **TILE_OPTIONS)
