"""Bytes and FLOPs of the package's own kernels, by the tensors that a launch is given.

A table has a formula for each kernel of Triton and each native CUDA op that a refresh may run. Each
tensor counts as read once and as written once. Tiles that a kernel reads again come from the L2
cache and are not counted again. Products count as they are executed, with the tiles below a
diagonal and the padding of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from lift_kernels.ops import cuda
from lift_kernels.ops.state_formats import GROUP


class Work(NamedTuple):
    """What one launch moves and computes.

    Attributes:
        bytes: from and to the memory of the device.
        bf16, tf32, fp32: FLOPs of products and factorizations by the unit that executes them.
        side, problems: of eigenproblems that are solved together.
    """

    bytes: float = 0.0
    bf16: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0
    side: int = 0
    problems: int = 0


def size(*tensors: Tensor | None) -> int:
    """Bytes of tensors. What is repeated by a stride of 0 is there once."""
    return sum(
        t.element_size() * prod(n for n, stride in zip(t.shape, t.stride()) if stride) for t in tensors if t is not None
    )


def _gram(product, block, previous, edge, raised, slab_rows, partials) -> list[Work]:
    """The Gram matrix of X, or of a combination of blocks, which is written to ``raised``."""
    rows, side = product.shape[1], partials.shape[-1]
    batch, _, pairs = partials.shape[:3]
    moved = size(product, block, previous, edge, raised, partials)
    return [Work(moved, fp32=2 * batch * pairs * side**2 * rows)]


def _cholesky_inverse(partials, gram, scale, inverse, status) -> list[Work]:
    """One launch sums the partial matrices into a triangle, one factors it and inverts the factor.

    Each of both takes a third of the cubed side in FLOPs.
    """
    batch, width, _ = gram.shape
    factor = 2 * size(gram) + size(scale, inverse, status)
    return [Work(size(partials) + size(gram) / 2), Work(factor, fp32=batch * 2 * width**3 / 3)]


def _multiply_upper(x, inverse, status) -> list[Work]:
    batch, rows, width = x.shape
    tile = cuda.tile(width)
    tiles = -(-width // tile)
    flops = 2 * batch * rows * tile**2 * tiles * (tiles + 1) // 2
    return [Work(2 * size(x) + size(inverse, status), fp32=flops)]


def _bitmap_to_indices(bitmaps, candidates, counts, columns, totals, indices, thresholds, status) -> list[Work]:
    """Choose, count, place and list. How many candidates there are depends on the numbers.

    All that fit are counted, which is more than there are.
    """
    return [
        Work(size(candidates, counts, thresholds, status)),
        Work(size(bitmaps, totals)),
        Work(2 * size(totals) + size(status)),
        Work(size(bitmaps, totals, status, indices)),
    ]


def _gather(source, indices, out) -> list[Work]:
    return [Work(size(indices, out) + indices.numel() * source.element_size())]


def _scatter(dest, indices, values) -> list[Work]:
    return [Work(size(indices, values) + indices.numel() * dest.element_size())]


NATIVE: dict[str, Callable[..., list[Work]]] = {
    "gram": _gram,
    "cholesky_inverse": _cholesky_inverse,
    "multiply_upper_": _multiply_upper,
    "gaussian_sketch_": lambda block, seed, first: [Work(size(block))],
    "bitmap_to_indices": _bitmap_to_indices,
    "packed_gather": _gather,
    "packed_scatter_": _scatter,
}
"""The launches of each native op, by its arguments."""


def _scan(named: dict[str, Any]) -> Work:
    """A sweep over the products. Three TF32 products of split factors make one."""
    batch = named["left"].shape[0]
    rows, columns, depth = (
        -(-named[extent] // named[tile]) * named[tile]
        for extent, tile in (("m", "ROWS"), ("n", "COLUMNS"), ("r", "DEPTH"))
    )
    names = "left", "right", "bracket", "bitmap", "ties", "candidates", "counts"
    products = 3 if named["PRECISION"] == "tf32x3" else 1
    return Work(size(*(named[name] for name in names)), tf32=products * 2 * batch * rows * columns * depth)


def _find(named: dict[str, Any]) -> Work:
    """Reads the new and the old lists, writes a position for each new entry."""
    return Work(size(named["blocks"]) + 12 * _entries(named))


def _take(named: dict[str, Any]) -> Work:
    """Reads positions and values, writes values. Entries that enter would read weights as well.

    8-bit moments are taken as fp32, and their scales are read.
    """
    return Work(size(named["blocks"]) + _scales(named) + _entries(named) * (4 + _moved(named)))


def _put(named: dict[str, Any]) -> Work:
    """Reads and writes values, or the new lists."""
    return Work(size(named["blocks"]) + _scales(named) + _entries(named) * _moved(named))


def _moved(named: dict[str, Any]) -> int:
    """Bytes of an entry in the arena and in scratch. A new list, read instead, has the arena's."""
    arena, values = named["arena"], named["values"]
    return arena.element_size() + (arena if values is None else values).element_size()


def _scales(named: dict[str, Any]) -> float:
    """Bytes of the scales of 8-bit moments."""
    return 0.0 if named["scales"] is None else _entries(named) * named["scales"].element_size() / GROUP


def _entries(named: dict[str, Any]) -> int:
    return len(named["blocks"]) * named["BLOCK"]


TRITON: dict[str, Callable[[dict[str, Any]], Work]] = {
    "_lowrank_topk_kernel": _scan,
    "_arena_migrate_find_kernel": _find,
    "_arena_migrate_take_kernel": _take,
    "_arena_migrate_put_kernel": _put,
}
"""The work of each kernel of Triton, by its arguments and their names."""
