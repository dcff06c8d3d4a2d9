"""Weight gradients of linear layers at the selected entries, in one kernel.

It keeps only the selected entries of its product. Two small launches come before: one marks the
entries of the list in a bitmap of the matrix, the other counts those before each tile of each row.
So a tile reads a few words of each row, and it knows which of its entries to store, and where.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..precision import tf32_allowed
from .bitmap_to_indices import popcount, set_bits
from .rounding import bits, narrow
from .targets import target_of, weight_grad_options

SEARCHES = 256
"""Searches of one program of the first kernel."""


@triton.jit(do_not_specialize=["m", "n", "count", "stride"])
def _tile_firsts_kernel(
    indices,  # (count,) int32, sorted
    firsts,  # (tiles, m) int32
    m,
    n,
    count,
    stride,  # largest power of two up to count
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the entries before each tile of each row, by bisection.

    Neighbors are tiles of one row, so that their searches walk through the same cache lines. The
    counts of one tile lie side by side, as the product reads them.
    """
    across = tl.cdiv(n, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, tile = place // across, place % across
    bound = row * n + tile * COLUMNS
    low = tl.zeros([BLOCK], dtype=tl.int32)
    while stride > 0:
        inside = low <= count - stride  # the sum of both could wrap
        below = inside & (tl.load(indices + low + (stride - 1), mask=inside, other=0).to(tl.int64) < bound)
        low = tl.where(below, low + stride, low)
        stride = stride >> 1
    tl.store(firsts + tile * m + row, low, mask=row < m)


@triton.jit
def _tile_in_bands(down, across, BAND: tl.constexpr):
    """Return this program's tile, as its place down and across a grid of ``down`` x ``across``.

    Programs walk through bands of BAND tiles down, column by column. Those that run at once then
    share both factors. In whole columns they would read all of ``grad_output`` for each column,
    which took an H200 up to 13 % longer.
    """
    program = tl.program_id(0)
    first = program // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    place = program - first * across
    return first + place % height, place // height


@triton.jit(do_not_specialize=["tokens"])
def _packed_weight_grad_kernel(
    grad_output,  # (tokens, m) fp32, bf16 or fp16, row-major
    input,  # (tokens, n), the same
    bitmap,  # (m, ceil(n / 32)) int32: the entries that are kept
    firsts,  # (tiles, m) int32: entries before each tile of each row
    out,  # (count,) in any storage format
    tokens,
    m,
    n,
    PRECISION: tl.constexpr,  # of an fp32 product: "ieee" or "tf32"
    WIDEN: tl.constexpr,  # multiply bf16 or fp16 as fp32
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BAND: tl.constexpr,
):
    """Form a tile of input^T @ grad_output, and store only the entries in the index list.

    The bits below an entry's in its row of the tile say how many places it stands behind the
    first. There are no atomics, because every entry belongs to one tile. The tile is transposed:
    a thread then holds few rows, so it needs few words of the bitmap, which cost registers.
    """
    WORDS: tl.constexpr = COLUMNS // 32
    down, across = _tile_in_bands(tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS), BAND)
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS
    width = tl.cdiv(n, 32)
    words = bitmap + row.to(tl.int64) * width + column // 32
    found = tl.zeros([ROWS], dtype=tl.int32)
    for i in tl.static_range(WORDS):
        found = found | tl.load(words + i, mask=(row < m) & (column // 32 + i < width), other=0)
    if tl.max((found != 0).to(tl.int32), axis=0) > 0:
        token = tl.arange(0, TOKENS)
        columns = column + tl.arange(0, COLUMNS)
        tile = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
        at_grad = grad_output + token.to(tl.int64)[:, None] * m + row[None, :]
        at_input = input + token.to(tl.int64)[:, None] * n + columns[None, :]
        # An int64 step: a side of 1 is a constant to the compiler and has no dtype to convert.
        ahead = tl.full([], TOKENS, tl.int64)
        for done in range(0, tokens, TOKENS):
            inside = token[:, None] < tokens - done
            g = tl.load(at_grad, mask=inside & (row[None, :] < m), other=0.0)
            x = tl.load(at_input, mask=inside & (columns[None, :] < n), other=0.0)
            if WIDEN:
                g = g.to(tl.float32)
                x = x.to(tl.float32)
            tile = tl.dot(tl.trans(x), g, tile, input_precision=PRECISION)
            at_grad += ahead * m
            at_input += ahead * n
        place = tl.load(firsts + across.to(tl.int64) * m + row, mask=row < m, other=0)
        lane = tl.arange(0, COLUMNS)[:, None]
        marks = tl.zeros([COLUMNS, ROWS], dtype=tl.uint32)
        places = tl.zeros([COLUMNS, ROWS], dtype=tl.int32)
        for i in tl.static_range(WORDS):
            word = tl.load(words + i, mask=(row < m) & (column // 32 + i < width), other=0).to(tl.uint32)
            marks = tl.where(lane // 32 == i, word[None, :], marks)
            places = tl.where(lane // 32 == i, place[None, :], places)
            place += popcount(word)
        bit = tl.full([1, 1], 1, tl.uint32) << (lane % 32).to(tl.uint32)
        places += popcount(marks & (bit - 1))
        tl.store(out + places, narrow(tile, out.dtype.element_ty), mask=(marks & bit) != 0)


def packed_weight_grad_triton(grad_output: Tensor, input: Tensor, indices: Tensor, out: Tensor) -> None:
    """Fill ``out`` (k,) with grad_output^T @ input at ``indices``, without a dense gradient.

    Args:
        grad_output: (t, m). It is made contiguous.
        input: (t, n) of the same dtype. It is made contiguous.
        indices: (k,) int32, sorted.
        out: (k,) fp32, bf16 or fp16. Sums are fp32. Products of fp32 are exact or TF32, like
            torch's own products on the GPU. They are exact, and slow, where a card lacks units for
            the dtype.
    """
    count = indices.numel()
    if count == 0:
        return
    grad_output, input = grad_output.contiguous(), input.contiguous()
    if dispatch.interpreting():  # its dot does not support bf16, and widening changes no value
        grad_output, input = grad_output.float(), input.float()
    (tokens, m), n = grad_output.shape, input.shape[1]
    options = weight_grad_options(
        target_of(indices.device), fp32=grad_output.dtype == torch.float32, tf32=tf32_allowed()
    )
    columns = options["COLUMNS"]
    tiles = triton.cdiv(n, columns)
    bitmap = torch.zeros(m, triton.cdiv(n, 32), dtype=torch.int32, device=indices.device)
    firsts = torch.empty(tiles, m, dtype=torch.int32, device=indices.device)
    with torch.cuda.device_of(indices):
        set_bits(bitmap, indices, n)
        _tile_firsts_kernel[(triton.cdiv(firsts.numel(), SEARCHES),)](
            indices, firsts, m, n, count, 1 << (count.bit_length() - 1), COLUMNS=columns, BLOCK=SEARCHES
        )
        _packed_weight_grad_kernel[(triton.cdiv(m, options["ROWS"]) * tiles,)](
            grad_output,
            input,
            bitmap,
            firsts,
            bits(out),
            tokens,
            m,
            n,
            **options,
        )
