"""Launches of the native CUDA ops that need scratch memory. No validation.

Scratch memory comes from torch's allocator, which knows streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

native = torch.ops.lift_kernels_native
# Rows of one step of the Gram kernel, fewest rows of a slab, and largest number of slabs.
_STEP, _SMALLEST_SLAB, _MAX_SLABS = 16, 512, 64
_TILE_WORDS = 1024  # words of a bitmap per thread block


def slab_rows(rows: int) -> int:
    """Return the rows that are summed into one partial Gram matrix.

    They depend on the number of rows alone, so that batching changes no bit.
    """
    return max(_SMALLEST_SLAB, -(-rows // (_MAX_SLABS * _STEP)) * _STEP)


def tile(width: int) -> int:
    """Return the columns of a tile of a Gram matrix."""
    return 64 if width <= 64 else 128


def cholesky_qr_(block: Tensor, other: Tensor | None, rounds: int) -> Tensor:
    """Run `lift_kernels.ops.cholesky_qr_`: four launches per round, five with ``other``."""
    status = block.new_empty(len(block), dtype=torch.int32)
    for _ in range(rounds):
        partials = _partials(block)
        native.gram.default(block, None, None, None, None, slab_rows(block.shape[1]), partials)
        _apply_inverse(partials, block, other, status)
    return status


def chebyshev_step_(product: Tensor, block: Tensor, previous: Tensor | None, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Run `lift_kernels.ops.chebyshev_step_`.

    The combination of the blocks is formed where its Gram matrix reads it.
    """
    status = block.new_empty(len(block), dtype=torch.int32)
    raised, partials = torch.empty_like(product), _partials(block)
    native.gram.default(product, block, previous, edge, raised, slab_rows(block.shape[1]), partials)
    _apply_inverse(partials, raised, block, status)
    return raised, status


def bitmap_to_indices(
    bitmaps: Tensor, candidates: Tensor, counts: Tensor, columns: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `lift_kernels.ops.bitmap_to_indices`: four launches for all matrices.

    It works on a copy of the bitmaps, which take 1/32 of the memory of fp32 matrices.
    """
    batch, words = len(bitmaps), bitmaps[0].numel() if len(bitmaps) else 0
    totals = bitmaps.new_empty(batch * -(-words // _TILE_WORDS))
    indices, status = bitmaps.new_empty(batch, k), bitmaps.new_empty(batch)
    thresholds = bitmaps.new_empty(batch, dtype=torch.float32)
    native.bitmap_to_indices.default(bitmaps.clone(), candidates, counts, columns, totals, indices, thresholds, status)
    return indices, thresholds, status


def _partials(block: Tensor) -> Tensor:
    batch, rows, width = block.shape
    side = tile(width)
    tiles = -(-width // side)
    return block.new_empty(batch, -(-rows // slab_rows(rows)), tiles * (tiles + 1) // 2, side, side)


def _apply_inverse(partials: Tensor, block: Tensor, other: Tensor | None, status: Tensor) -> None:
    batch, width = len(block), block.shape[-1]
    gram, inverse, scale = (partials.new_empty(batch, *shape) for shape in ((width, width), (width, width), (width,)))
    native.cholesky_inverse.default(partials, gram, scale, inverse, status)
    native.multiply_upper_.default(block, inverse, status)
    if other is not None:
        native.multiply_upper_.default(other, inverse, status)
