"""Bitmaps of selections as sorted index lists, for many matrices at once.

It is used where the native CUDA version is absent. A bitmap is (m, ceil(n / 32)) int32, and each
row starts a new word. A candidate is ``key << 32 | (LAST - position)`` int64. So the larger
candidate has the larger key or, of equal keys, the lower position. Atomics only "or" integers, in
any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .memory import load_stream

BLOCK = 1024
CHOOSE = {"BLOCK": 2048, "DIGIT": 9}  # seven digits of 9 bits make the 63 bits of a candidate
CHOOSE_WARPS = 8


@triton.jit
def popcount(x):
    """Count the bits set in each uint32, as int32.

    The compiler recognizes this idiom and makes one instruction of it.
    """
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _set(bitmap, position, n, mask):
    """Set the bits of flat int32 positions in a bitmap of ``n`` columns."""
    word = position // n * tl.cdiv(n, 32) + position % n // 32
    bit = (1 << (position % n % 32).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(bitmap + word, bit, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["m", "n", "capacity", "k"])
def _bitmap_choose_kernel(
    bitmaps,  # (b, m, words) int32, in which the bits of the chosen candidates are set
    candidates,  # (b, capacity) int64
    counts,  # (b, 2) int32: bits set before, candidates
    thresholds,  # (b,) int32 patterns of the k-th magnitudes
    status,  # (b,) int32: 1 where the candidates do not hold the k-th magnitude, 0 elsewhere
    m,
    n,
    capacity,
    k,
    BLOCK: tl.constexpr,
    DIGIT: tl.constexpr,
):
    """Find the pivot among the candidates digit by digit, one program per matrix.

    The search starts at the highest digit in which two candidates differ.
    """
    BINS: tl.constexpr = 1 << DIGIT
    LAST: tl.constexpr = 0x7FFFFFFF
    matrix = tl.program_id(0).to(tl.int64)
    definite = tl.load(counts + 2 * matrix)
    near = tl.load(counts + 2 * matrix + 1)
    if (definite >= k) | (near.to(tl.int64) + definite < k) | (near > capacity):
        tl.store(status + matrix, 1)
        tl.store(thresholds + matrix, 0x7FC00000)
    else:
        candidates += matrix * capacity
        lanes = tl.arange(0, BLOCK)
        pivot = tl.load(candidates)
        differ = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(0, near, BLOCK):
            differ = tl.maximum(
                differ, tl.load(candidates + start + lanes, mask=lanes < near - start, other=pivot) ^ pivot
            )
        highest = tl.max(differ, axis=0)
        low = 0
        while (highest >> low) > 0:
            low += DIGIT
        pivot = pivot >> low << low  # its bits from `low` up are known
        rank = k - definite  # of the `sharing` candidates with these bits, `rank` are chosen
        sharing = near
        while (low > 0) & (sharing > rank):
            histogram = tl.zeros([BINS], dtype=tl.int32)
            for start in range(0, near, BLOCK):
                candidate = tl.load(candidates + start + lanes, mask=lanes < near - start, other=0)
                same = (lanes < near - start) & ((candidate ^ pivot) >> low == 0)
                digit = (candidate >> (low - DIGIT)).to(tl.int32) & (BINS - 1)
                histogram += tl.histogram(digit, BINS, mask=same)
            low -= DIGIT
            above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)
            # The highest bin in which the count reaches the rank.
            bin = tl.sum((above + histogram >= rank).to(tl.int32), axis=0) - 1
            at = tl.arange(0, BINS) == bin
            rank -= tl.sum(tl.where(at, above, 0), axis=0)
            sharing = tl.sum(tl.where(at, histogram, 0), axis=0)
            pivot = pivot | (bin.to(tl.int64) << low)
        bitmaps += matrix * m * tl.cdiv(n, 32)
        least = tl.full([BLOCK], LAST, dtype=tl.int32)
        for start in range(0, near, BLOCK):
            candidate = tl.load(candidates + start + lanes, mask=lanes < near - start, other=-1)
            chosen = candidate >= pivot
            position = (LAST - (candidate & LAST)).to(tl.int32)
            _set(bitmaps, position, n, chosen & (position // n < m))
            least = tl.where(chosen, tl.minimum(least, (candidate >> 32).to(tl.int32)), least)
        tl.store(status + matrix, 0)
        tl.store(thresholds + matrix, tl.min(least, axis=0))


@triton.jit(do_not_specialize=["count", "n"])
def _set_bits_kernel(bitmap, positions, count, n, BLOCK: tl.constexpr):
    """Set the bits of ``positions`` (count,) int32, flat in a matrix of ``n`` columns."""
    start = tl.program_id(0) * BLOCK
    position = load_stream(positions + start, count - start, BLOCK)
    _set(bitmap, position, n, tl.arange(0, BLOCK) < count - start)


@triton.jit
def _load_words(bitmaps, length, n, BLOCK: tl.constexpr):
    """Load this program's words of its matrix as uint32.

    Bits behind the last column are dropped. Also returns the number of the first word, and the
    matrix.
    """
    blocks = tl.cdiv(length, BLOCK)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    words = load_stream(bitmaps + matrix * length + start, length - start, BLOCK).to(tl.uint32)
    last = (start + tl.arange(0, BLOCK) + 1) % tl.cdiv(n, 32) == 0
    real = tl.where(n % 32 == 0, 0xFFFFFFFF, (1 << (n % 32).to(tl.uint32)) - 1).to(tl.uint32)
    return tl.where(last, words & real, words), start, matrix


@triton.jit(do_not_specialize=["n"])
def _count_bits_kernel(bitmaps, totals, length, n, BLOCK: tl.constexpr):
    """totals[program] = bits set in its block of the ``length`` words of a matrix."""
    words, _, _ = _load_words(bitmaps, length, n, BLOCK)
    tl.store(totals + tl.program_id(0), tl.sum(popcount(words)))


@triton.jit(do_not_specialize=["count", "n"])
def _list_bits_kernel(bitmaps, ends, out, length, count, n, BLOCK: tl.constexpr):
    """Write the flat positions of the first ``count`` bits of each matrix, in order.

    ``ends`` holds the number of bits set up to the end of each block.
    """
    words, start, matrix = _load_words(bitmaps, length, n, BLOCK)
    bits = popcount(words)
    place = tl.load(ends + tl.program_id(0)) - tl.sum(bits) + tl.cumsum(bits, axis=0) - bits
    word = start + tl.arange(0, BLOCK)
    width = tl.cdiv(n, 32)
    position = word // width * n + word % width * 32
    out += matrix * count
    for _ in range(tl.max(bits)):  # the lowest bit of every word, then the next
        rest = words & (words - 1)
        tl.store(out + place, position + popcount((words ^ rest) - 1), mask=(words != 0) & (place < count))
        words = rest
        place += 1


def bitmap_to_indices_triton(
    bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `lift_kernels.ops.bitmap_to_indices`: three launches for all matrices.

    It works on a copy of the bitmaps.
    """
    (batch, rows, _), capacity = bitmaps.shape, candidates.shape[1]
    thresholds, status = bitmaps.new_empty(batch), bitmaps.new_empty(batch)
    if batch == 0:
        return bitmaps.new_empty(0, k), thresholds.view(torch.float32), status
    bitmaps = bitmaps.clone()
    with torch.cuda.device_of(bitmaps):
        _bitmap_choose_kernel[(batch,)](
            bitmaps,
            candidates,
            counts,
            thresholds,
            status,
            rows,
            columns,
            capacity,
            k,
            **CHOOSE,
            num_warps=CHOOSE_WARPS,
        )
        indices, totals = list_bits(bitmaps, k, columns)
    missed = (status != 0) | (totals != k)
    indices.masked_fill_(missed[:, None], -1)
    return indices, thresholds.view(torch.float32).masked_fill_(missed, torch.nan), missed.int()


def set_bits(bitmap: Tensor, positions: Tensor, n: int) -> None:
    """Set the bits of flat ``positions`` (count,) int32 in the bitmap of one matrix.

    The matrix has ``n`` columns.
    """
    count = positions.numel()
    _set_bits_kernel[(triton.cdiv(count, BLOCK),)](bitmap, positions, count, n, BLOCK=BLOCK, num_warps=4)


def list_bits(bitmaps: Tensor, count: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the first ``count`` bits of each bitmap, and its number of bits.

    Args:
        bitmaps: (b, m, words) int32 of ``n`` columns.
        count: positions per bitmap.
        n: columns.

    Returns:
        Positions (b, count) int32, and the bits set in each bitmap (b,) int32.
    """
    batch, length = len(bitmaps), bitmaps[0].numel()
    blocks = triton.cdiv(length, BLOCK)
    totals = bitmaps.new_empty(batch, blocks)
    _count_bits_kernel[(batch * blocks,)](bitmaps, totals, length, n, BLOCK=BLOCK, num_warps=4)
    out = bitmaps.new_empty(batch, count)
    ends = totals.cumsum(1, dtype=torch.int32)
    _list_bits_kernel[(batch * blocks,)](bitmaps, ends, out, length, count, n, BLOCK=BLOCK, num_warps=4)
    return out, ends[:, -1]
