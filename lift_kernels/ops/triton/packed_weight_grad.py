"""Weight gradients of linear layers at the selected entries, in one kernel.

It keeps only the selected entries of its product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dispatch
from ..precision import tf32_allowed
from .rounding import bits, narrow

ROWS, COLUMNS, TOKENS, ENTRIES = 128, 128, 32, 8
"""Tile sizes of the fused kernel.

They are the sides of a tile of the gradient, the tokens of one step of the product, and the entries
of a row that the epilogue writes at once.
"""
WARPS, STAGES = 8, 3


@triton.jit
def _lower_bound(indices, bound, count, stride):
    """Count how many of the ``count`` sorted ``indices`` lie below each int64 ``bound``.

    ``stride`` is the largest power of two up to count, or 0 for none.
    """
    low = tl.zeros_like(bound).to(tl.int32)
    while stride > 0:
        ahead = low + stride
        inside = ahead <= count
        below = inside & (tl.load(indices + ahead - 1, mask=inside, other=0).to(tl.int64) < bound)
        low = tl.where(below, ahead, low)
        stride = stride >> 1
    return low


@triton.jit(do_not_specialize=["tokens", "count", "stride"])
def _packed_weight_grad_kernel(
    grad_output,  # (tokens, m) fp32, bf16 or fp16, row-major
    input,  # (tokens, n), the same
    indices,  # (count,) int32, sorted
    out,  # (count,) in any storage format
    tokens,
    m,
    n,
    count,
    stride,  # largest power of two up to count, 0 for none
    PRECISION: tl.constexpr,  # of an fp32 product: "ieee" or "tf32"
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Form a tile of grad_output^T @ input, and store only the entries in the index list.

    The entries of a row within a tile are neighbors in the list. So each row of the tile searches
    for its first and its last one. There are no atomics, because every entry belongs to one tile.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS
    start = row.to(tl.int64) * n + column
    width = tl.minimum(n - column, COLUMNS)
    first = _lower_bound(indices, start, count, stride)
    last = tl.where(row < m, _lower_bound(indices, start + width, count, stride), first)
    longest = tl.max(last - first, axis=0)
    if longest > 0:
        token = tl.arange(0, TOKENS)
        columns = column + tl.arange(0, COLUMNS)
        tile = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        at_grad = grad_output + token.to(tl.int64)[:, None] * m + row[None, :]
        at_input = input + token.to(tl.int64)[:, None] * n + columns[None, :]
        # An int64 step: a side of 1 is a constant to the compiler and has no dtype to convert.
        ahead = tl.full([], TOKENS, tl.int64)
        for done in range(0, tokens, TOKENS):
            inside = token[:, None] < tokens - done
            g = tl.load(at_grad, mask=inside & (row[None, :] < m), other=0.0)
            x = tl.load(at_input, mask=inside & (columns[None, :] < n), other=0.0)
            tile = tl.dot(tl.trans(g), x, tile, input_precision=PRECISION)
            at_grad += ahead * m
            at_input += ahead * n
        lane = tl.arange(0, ENTRIES)
        # What a gather computes from its layout alone would otherwise move out of the loop and stay
        # in registers. With Triton 3.6 registers then spill.
        for done in tl.range(0, longest, ENTRIES, disable_licm=True):
            place = first[:, None] + done + lane[None, :]
            real = place < last[:, None]
            index = tl.load(indices + place, mask=real, other=0).to(tl.int64)
            within = tl.where(real, index - start[:, None], 0).to(tl.int32)
            tl.store(out + place, narrow(tl.gather(tile, within, axis=1), out.dtype.element_ty), mask=real)


def packed_weight_grad_triton(grad_output: Tensor, input: Tensor, indices: Tensor, out: Tensor) -> None:
    """Fill ``out`` (k,) with grad_output^T @ input at ``indices``, without a dense gradient.

    Args:
        grad_output: (t, m). It is made contiguous.
        input: (t, n) of the same dtype. It is made contiguous.
        indices: (k,) int32, sorted.
        out: (k,) fp32, bf16 or fp16. Sums are fp32. Products of fp32 are exact or TF32, like
            torch's own products on the GPU.
    """
    count = indices.numel()
    if count == 0:
        return
    grad_output, input = grad_output.contiguous(), input.contiguous()
    if dispatch.interpreting():  # its dot does not support bf16, and widening changes no value
        grad_output, input = grad_output.float(), input.float()
    (tokens, m), n = grad_output.shape, input.shape[1]
    precision = "tf32" if tf32_allowed() else "ieee"
    with torch.cuda.device_of(indices):
        _packed_weight_grad_kernel[(triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS))](
            grad_output,
            input,
            indices,
            bits(out),
            tokens,
            m,
            n,
            count,
            1 << (count.bit_length() - 1),
            PRECISION=precision,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            TOKENS=TOKENS,
            ENTRIES=ENTRIES,
            num_warps=WARPS,
            num_stages=STAGES,
        )
