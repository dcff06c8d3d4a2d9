"""Kernels that move entries between dense tensors and packed vectors, or sum squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_tables import block_size, block_table, pointer_table
from .memory import load_stream, store_stream
from .rounding import FORMATS, bits, narrow, widen


@triton.jit
def _convert(x, FORMAT: tl.constexpr):
    """Round a block to nearest even in another storage format.

    A block that has that format already keeps its bits.
    """
    if x.dtype == FORMAT:
        return x
    else:
        return narrow(widen(x), FORMAT)


@triton.jit(do_not_specialize=["count"])
def _packed_gather_kernel(source, indices, out, count, BLOCK: tl.constexpr):
    """out[i] = source[indices[i]].

    ``indices`` is (count,) int32, and ``out`` is (count,) in any storage format.
    """
    start = tl.program_id(0) * BLOCK
    left = count - start
    index = load_stream(indices + start, left, BLOCK).to(tl.int64)
    x = tl.load(source + index, mask=tl.arange(0, BLOCK) < left, other=0)
    store_stream(out + start, _convert(x, out.dtype.element_ty), left, BLOCK)


@triton.jit(do_not_specialize=["count"])
def _packed_scatter_kernel(dest, indices, values, count, BLOCK: tl.constexpr):
    """dest[indices[i]] = values[i].

    ``indices`` is (count,) int32, and ``values`` is (count,) in any storage format.
    """
    start = tl.program_id(0) * BLOCK
    left = count - start
    index = load_stream(indices + start, left, BLOCK).to(tl.int64)
    x = load_stream(values + start, left, BLOCK)
    tl.store(dest + index, _convert(x, dest.dtype.element_ty), mask=tl.arange(0, BLOCK) < left)


@triton.jit(do_not_specialize=["old_count", "new_count", "stride"])
def _packed_migrate_kernel(values, old_indices, new_indices, out, old_count, new_count, stride, BLOCK: tl.constexpr):
    """out[i] = values[j] where old_indices[j] == new_indices[i].

    Other elements of ``out`` (new_count,) stay. Each new entry counts the old ones below it, its
    lower bound, in steps of ``stride``, stride/2, ..., 1. ``stride`` is the largest power of two up
    to old_count, or 0 for none. There are no atomics, and neighbors walk through the same cache
    lines.
    """
    start = tl.program_id(0) * BLOCK
    left = new_count - start
    lanes = tl.arange(0, BLOCK)
    entry = load_stream(new_indices + start, left, BLOCK)
    low = tl.zeros([BLOCK], dtype=tl.int32)
    while stride > 0:
        ahead = low + stride
        inside = ahead <= old_count
        below = inside & (tl.load(old_indices + ahead - 1, mask=inside, other=0) < entry)
        low = tl.where(below, ahead, low)
        stride = stride >> 1
    found = (low < old_count) & (lanes < left)
    found = found & (tl.load(old_indices + low, mask=found, other=0) == entry)
    tl.store(out + start + lanes, tl.load(values + low, mask=found, other=0), mask=found)


@triton.jit
def _packed_square_sums_kernel(
    grads,  # (n,) int64 addresses of matrices, or of packed vectors
    blocks,  # (programs, 4) int64: matrix, arena position, position in the list, entries left
    indices,  # arena, int32
    partials,  # (programs,) fp64
    GRAD: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE_GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the squared entries of each program in fp64.

    There squares of fp32 numbers neither overflow nor vanish.
    """
    row = blocks + tl.program_id(0).to(tl.int64) * 4
    matrix = tl.load(row)
    start = tl.load(row + 1)
    place = tl.load(row + 2)
    count = tl.minimum(tl.load(row + 3), BLOCK).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    grad = tl.load(grads + matrix).to(tl.pointer_type(GRAD), bitcast=True)
    if PACKED:
        if WIDE_GRADS:
            place = tl.multiple_of(place, 64)
            grad = tl.multiple_of(grad, 16)
        g = load_stream(grad + place, count, BLOCK)
    else:
        if ALIGNED:
            start = tl.multiple_of(start, 64)
            inside = lanes < tl.cdiv(count, 64) * 64
        else:
            inside = lanes < count
        index = tl.load(indices + start + lanes, mask=inside, other=0).to(tl.int64)
        g = tl.load(grad + index, mask=lanes < count, other=0)
    g = widen(g).to(tl.float64)
    tl.store(partials + tl.program_id(0), tl.sum(g * g, axis=0))


def packed_gather_triton(source: Tensor, indices: Tensor, out: Tensor) -> None:
    """Fill ``out`` (k,) with the entries of contiguous ``source`` at ``indices`` (k,) int32.

    ``source`` and ``out`` are fp32, bf16 or fp16.
    """
    _launch(_packed_gather_kernel, indices.numel(), bits(source), indices, bits(out), indices.numel())


def packed_scatter_triton(dest: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write ``values`` (k,) into contiguous ``dest`` at ``indices`` (k,) int32.

    ``dest`` and ``values`` are fp32, bf16 or fp16.
    """
    _launch(_packed_scatter_kernel, indices.numel(), bits(dest), indices, bits(values), indices.numel())


def packed_migrate_triton(values: Tensor, old_indices: Tensor, new_indices: Tensor, out: Tensor) -> None:
    """Write the values of the entries in both sorted lists into ``out`` (k_new,).

    ``values`` and ``out`` are fp32, bf16, fp16 or int32.
    """
    old, new = old_indices.numel(), new_indices.numel()
    stride = 1 << (old.bit_length() - 1) if old > 0 else 0
    _launch(_packed_migrate_kernel, new, bits(values), old_indices, new_indices, bits(out), old, new, stride)


def packed_square_sums_triton(
    grads: Sequence[Tensor], indices: Tensor, offsets: Sequence[int], counts: Sequence[int], packed_grads: bool
) -> Tensor:
    """Return sums of squares over the selected entries, (programs,) fp64.

    Gradients are contiguous. The bits are the same every time.
    """
    block = block_size()
    with torch.cuda.device_of(indices):
        blocks, aligned = block_table(offsets, counts, indices.numel(), block, indices.device)
        partials = torch.empty(blocks.shape[0], dtype=torch.float64, device=indices.device)
        if partials.numel() > 0:
            grad_table, wide_grads = pointer_table(grads, indices.device)
            _packed_square_sums_kernel[(partials.numel(),)](
                grad_table,
                blocks,
                indices,
                partials,
                GRAD=FORMATS[grads[0].dtype],
                PACKED=packed_grads,
                ALIGNED=aligned,
                WIDE_GRADS=wide_grads,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=False,
            )
        return partials


def _launch(kernel, entries: int, *arguments) -> None:
    """Run a kernel with one program per block of entries, on the device of its arguments."""
    block = block_size()
    if entries > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(triton.cdiv(entries, block),)](*arguments, BLOCK=block, num_warps=4, enable_fp_fusion=False)
