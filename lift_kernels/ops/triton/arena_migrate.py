"""Kernels that move the segments of many matrices to new index lists, in place.

One launch finds the old position of every new entry. Each arena is then taken into scratch by one
launch and put back by another, since programs of one segment read and write each other's parts.
Scratch is compact: program p owns ``p * BLOCK .. (p + 1) * BLOCK``. So it needs no masks. 8-bit
moments are taken as fp32, because other entries share their scales afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_tables import block_size, block_table, migration_table
from .memory import load_stream, store_stream
from .rounding import FORMATS, bits, widen
from .state_formats import GROUP, decode, encode_first, encode_root, group_scales

MAX_SCRATCH = 2**27
"""Entries of scratch, which have 8 bytes each. One matrix may need more."""


@triton.jit
def _list_of(matrices, row, WIDE: tl.constexpr):
    """Return where the part of a new list begins that a row of `block_table` describes."""
    place = tl.load(row + 2)
    new = tl.load(matrices + tl.load(row) * 4 + 1).to(tl.pointer_type(tl.int32), bitcast=True)
    if WIDE:  # the hints would be lost on parameters
        new = tl.multiple_of(new, 16)
        place = tl.multiple_of(place, 64)
    return new + place


@triton.jit
def _arena_migrate_find_kernel(
    matrices,  # (n, 4) int64 of `migration_table`
    blocks,  # (programs, 4) int64: matrix, arena position, position in the new list, entries left
    indices,  # arena of the old lists, int32
    positions,  # (programs, BLOCK) int32
    kept,  # (n,) int64, zeros
    WIDE_LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the place of each new entry in the old list of its matrix, or -1, and count the others.

    Each entry counts the old ones below it by bisection, as `packed_migrate` does. The counts are
    integers, so the order of the atomic additions does not matter.
    """
    row = blocks + tl.program_id(0).to(tl.int64) * 4
    matrix = tl.load(row)
    old = indices + (tl.load(row + 1) - tl.load(row + 2))
    left = tl.minimum(tl.load(row + 3), BLOCK).to(tl.int32)
    count = tl.load(matrices + matrix * 4 + 2).to(tl.int32)
    stride = tl.load(matrices + matrix * 4 + 3).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    entry = load_stream(_list_of(matrices, row, WIDE_LISTS), left, BLOCK)
    low = tl.zeros([BLOCK], dtype=tl.int32)
    while stride > 0:
        inside = low <= count - stride  # the sum of both could wrap
        below = inside & (tl.load(old + low + (stride - 1), mask=inside, other=0) < entry)
        low = tl.where(below, low + stride, low)
        stride = stride >> 1
    found = (low < count) & (lanes < left)
    found = found & (tl.load(old + low, mask=found, other=0) == entry)
    tl.store(positions + tl.program_id(0).to(tl.int64) * BLOCK + lanes, tl.where(found, low, -1))
    tl.atomic_add(kept + matrix, tl.sum(found.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _arena_migrate_take_kernel(
    matrices,
    blocks,
    arena,  # moments in fp32, as bf16 patterns or codes; patterns or low halves of masters; births
    scales,  # of the codes, fp32; None without codes
    positions,
    values,  # (programs, BLOCK) in the arena's format, or in fp32 for codes
    steps,  # (n,) fp32; None but for births
    WEIGHT: tl.constexpr,  # format of the weights; None but for fp32 masters
    WIDE_LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the values at the old positions, and those of the entries that enter."""
    row = blocks + tl.program_id(0).to(tl.int64) * 4
    matrix = tl.load(row)
    offset = tl.load(row + 1) - tl.load(row + 2)
    lanes = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    position = tl.load(positions + start + lanes)
    x = tl.load(arena + offset + position, mask=position >= 0, other=0)
    if scales is not None:
        x = decode(x, tl.load(scales + offset // GROUP + position // GROUP, mask=position >= 0, other=0.0))
    if WEIGHT is not None:
        enters = (position < 0) & (lanes < tl.load(row + 3))
        index = tl.load(_list_of(matrices, row, WIDE_LISTS) + lanes, mask=enters, other=0).to(tl.int64)
        weight = tl.load(matrices + matrix * 4).to(tl.pointer_type(WEIGHT), bitcast=True)
        w = widen(tl.load(weight + index, mask=enters, other=0)).to(tl.int32, bitcast=True)
        x = tl.where(enters, w, x)
    if steps is not None:
        x = tl.where(position < 0, tl.load(steps + matrix).to(tl.int32), x)
    tl.store(values + start + lanes, x)


@triton.jit
def _arena_migrate_put_kernel(
    matrices,
    blocks,
    values,  # (programs, BLOCK) as they were taken; None for the new lists
    arena,
    scales,  # of the codes, fp32; None without codes
    ALIGNED: tl.constexpr,
    WIDE_LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the values of each program, or its part of a new list, into its segment."""
    row = blocks + tl.program_id(0).to(tl.int64) * 4
    start = tl.load(row + 1)
    left = tl.minimum(tl.load(row + 3), BLOCK).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 64)
    if values is None:
        x = load_stream(_list_of(matrices, row, WIDE_LISTS), left, BLOCK)
    else:
        x = tl.load(values + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    if scales is not None:
        real = tl.arange(0, BLOCK) < left
        if arena.dtype.element_ty == tl.int8:
            x, new_scales = encode_first(x, real, BLOCK)
        else:
            x, new_scales = encode_root(x, 0.5, real, BLOCK)
        group, owned = group_scales(start, left, BLOCK)
        tl.store(scales + group, new_scales, mask=owned)
    store_stream(arena + start, x, left, BLOCK)


class Arena(NamedTuple):
    """An arena that is moved, as the kernels take it.

    Attributes:
        data: the arena.
        scales: of 8-bit moments.
        steps: of births, the step counts that entering entries get.
        weight: of fp32 masters, the format of the weights that entering entries take.
    """

    data: Tensor
    scales: Tensor | None = None
    steps: Tensor | None = None
    weight: object = None


def arena_migrate_triton(
    weights: Sequence[Tensor],
    new_indices: Sequence[Tensor],
    indices: Tensor,
    offsets: Sequence[int],
    counts: Sequence[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    master: Tensor | None,
    births: Tensor | None,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
) -> Tensor:
    """Run `lift_kernels.ops.arena_migrate_`: 11 launches at most for up to 2^27 entries."""
    kept = torch.zeros(len(weights), dtype=torch.int64, device=indices.device)
    arenas = [Arena(bits(exp_avg), exp_avg_scale), Arena(bits(exp_avg_sq), exp_avg_sq_scale)]
    if master is not None and master.dtype == torch.int16:
        arenas.append(Arena(master))  # An entry that enters has the weight's value, whose low half is 0.
    elif master is not None:
        arenas.append(Arena(master.view(torch.int32), weight=FORMATS[weights[0].dtype]))
    block = block_size()
    with torch.cuda.device_of(indices):
        for part in _parts([new.numel() for new in new_indices], block):
            part_arenas = arenas + ([Arena(births, steps=steps[part])] if births is not None else [])
            lists = new_indices[part]
            blocks, aligned = block_table(
                offsets[part], [new.numel() for new in lists], indices.numel(), block, indices.device
            )
            matrices, wide = migration_table(weights[part], lists, counts[part], indices.device)
            _move(matrices, blocks, indices, part_arenas, kept[part], aligned, wide)
    return kept


def _move(
    matrices: Tensor,
    blocks: Tensor,
    indices: Tensor,
    arenas: list[Arena],
    kept: Tensor,
    aligned: bool,
    wide: bool,
) -> None:
    """Move matrices whose scratch fits."""
    grid, block = (len(blocks),), block_size()
    if len(blocks) == 0:
        return
    positions = torch.empty(len(blocks) * block, dtype=torch.int32, device=indices.device)
    values = torch.empty_like(positions)
    wide_lists = {"WIDE_LISTS": wide, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": False}
    _arena_migrate_find_kernel[grid](matrices, blocks, indices, positions, kept, **wide_lists)
    for arena, scales, steps, weight in arenas:
        taken = values.view(arena.dtype if scales is None else torch.float32)
        _arena_migrate_take_kernel[grid](
            matrices, blocks, arena, scales, positions, taken, steps, WEIGHT=weight, **wide_lists
        )
        _arena_migrate_put_kernel[grid](matrices, blocks, taken, arena, scales, ALIGNED=aligned, **wide_lists)
    _arena_migrate_put_kernel[grid](matrices, blocks, None, indices, None, ALIGNED=aligned, **wide_lists)


def _parts(counts: Sequence[int], block: int) -> Iterator[slice]:
    """Split matrices with ``counts`` new entries where the scratch of a part would be too long."""
    first = scratch = 0
    for i, count in enumerate(counts):
        needed = triton.cdiv(count, block) * block
        if scratch + needed > MAX_SCRATCH and i > first:
            yield slice(first, i)
            first, scratch = i, 0
        scratch += needed
    yield slice(first, len(counts))
