"""Bytes, FLOPs and launches of a warm refresh of LLaMA-2-7B, by reference and CUDA ops.

The ops are the subspace-iteration ops. All is computed, not timed. The factorization of one matrix
of each shape runs on the CPU under a dispatch mode that counts, with a basis from which one degree
suffices. It is counted for the batches that `principal.MEMORY_BUDGET` makes on a GPU. Counted are

- launches: torch calls that compute something (a view is none), at one launch each, although a
  library call may make more;
- bytes: every tensor that a call reads or writes, once. For a CUDA op they are what its kernels
  move to and from memory. Tiles that they read again from the L2 cache are not counted again;
- FLOPs: of products and triangular solves as executed, tiles below the diagonal included, in TF32
  where a GPU takes it, else fp32. Of eigenproblems there is one call a batch and degree, and no
  count.

The selection is left out: it reads the factors and writes lists in both. In the column ``way`` of
the CSV, ``twins`` are the references and ``helpers`` the CUDA ops.

    python -m bench.refresh_cost [--rank 128] [--scale 8]
        [--csv bench/results/computed/refresh_cost.csv]

``--scale`` divides all sides and the rank for a quick run. Bytes and FLOPs are then of the smaller
model.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.common import results
from lift_kernels import ops
from lift_kernels.masks import chebyshev, costs, lowrank, principal
from lift_kernels.ops import cuda, reference

SHAPES = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
QUANTITIES = ("launches", "bytes", "tf32_flops", "fp32_flops")
PARTS = ("whole matrices", "tall blocks", "eigenproblems")


class Cost(Counter):
    """Sums by (part, quantity)."""

    def add(self, part: str, launches: int, moved: float, flops: float, tf32: bool = False) -> None:
        kind = "tf32_flops" if tf32 else "fp32_flops"
        self.update({(part, "launches"): launches, (part, "bytes"): moved, (part, kind): flops})


class Counting(TorchDispatchMode):
    """Adds every torch call to a `Cost`.

    A call is a product with a whole matrix, an eigenproblem, or one of the rest.
    """

    def __init__(self, cost: Cost, numel: int) -> None:
        super().__init__()
        self.cost, self.numel, self.tf32 = cost, numel, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or not returns:
            return out  # a view
        if func is torch.ops.aten._local_scalar_dense.default:
            return out  # A number is read. On a GPU those of a batch are read together.
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}.values()
        moved = sum(t.untyped_storage().nbytes() if 0 in t.stride() else t.numel() * t.element_size() for t in tensors)
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif func is torch.ops.aten.linalg_solve_triangular.default:
            flops = args[1].numel() * args[0].shape[-1]
        large = any(t.numel() >= self.numel for t in tensors)
        part = (
            "eigenproblems"
            if func is torch.ops.aten._linalg_eigh.default
            else "whole matrices"
            if large
            else "tall blocks"
        )
        self.cost.add(part, 1, moved, flops, self.tf32)
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`chebyshev.product`, which a GPU forms in TF32."""
        self.tf32 = True
        try:
            return a @ b
        finally:
            self.tf32 = False

    def squared_lengths(self, image: Tensor) -> Tensor:
        """`chebyshev.squared_lengths` on a GPU."""
        return self.product(image.mT, image).diagonal(dim1=1, dim2=2)


def op_cost(cost: Cost, rows: int, width: int, blocks_read: int, multiplied: int) -> None:
    """Add one round of a CUDA op.

    A round is the Gram matrix of X (``blocks_read`` 1) or of a combination of blocks, and
    ``multiplied`` blocks times R^-1.
    """
    tile = cuda.tile(width)
    tiles = -(-width // tile)
    pairs, slabs, block = tiles * (tiles + 1) // 2, -(-rows // cuda.slab_rows(rows)), 4 * rows * width
    partials, square = 4 * slabs * pairs * tile * tile, 4 * width * width
    written = block if blocks_read > 1 else 0
    cost.add("tall blocks", 1, blocks_read * block + written + partials, 2 * pairs * tile * tile * rows)
    cost.add("tall blocks", 1, partials + square / 2, 0)
    cost.add("tall blocks", 1, 3 * square, 2 * width**3 / 3)
    for _ in range(multiplied):
        cost.add("tall blocks", 1, 2 * block + square, 2 * rows * tile * tile * pairs)


@contextmanager
def cuda_ops(cost: Cost):
    """Count the cost of the CUDA ops in place of the references', which still compute."""
    qr, step, sketch = ops.cholesky_qr_, ops.chebyshev_step_, ops.gaussian_sketch

    def counted_qr(block, other=None, *, rounds=1):
        for _ in range(rounds):
            op_cost(cost, *block.shape[1:], blocks_read=1, multiplied=1 if other is None else 2)
        with torch.utils._python_dispatch._disable_current_modes():
            return qr(block, other, rounds=rounds)

    def counted_step(product, block, previous, edge):
        op_cost(cost, *block.shape[1:], blocks_read=2 if previous is None else 3, multiplied=2)
        with torch.utils._python_dispatch._disable_current_modes():
            return step(product, block, previous, edge)

    with mock.patch.multiple(ops, cholesky_qr_=counted_qr, chebyshev_step_=counted_step, gaussian_sketch=sketch):
        yield


def reference_ops():
    """Let the references' calls be counted, where an op would be one call."""
    qr, step = reference.cholesky_qr_ref_, reference.chebyshev_step_ref_
    return mock.patch.multiple(ops, cholesky_qr_=qr, chebyshev_step_=step)


def refresh(shape: tuple[int, int], rank: int, matrices: int, with_cuda: bool) -> Cost:
    """Cost of the warm factorization of a batch of matrices."""
    generator = torch.Generator().manual_seed(0)
    width = costs.block_width(shape, rank, warm=True)
    # A few large directions over noise: the basis below has them, and one degree confirms it.
    left, right = (torch.randn(side, width, generator=generator) for side in shape)
    weight = left @ right.T + 0.01 * torch.randn(*shape, generator=generator)
    u, _, v = torch.svd_lowrank(weight, q=width, niter=1)
    basis = (v if shape[0] >= shape[1] else u).flip(1).bfloat16()  # in ascending order
    cost = Cost()
    counting = Counting(cost, weight.numel())
    with (
        counting,
        mock.patch.object(chebyshev, "product", counting.product),
        mock.patch.object(chebyshev, "squared_lengths", counting.squared_lengths),
        cuda_ops(cost) if with_cuda else reference_ops(),
    ):
        factors = lowrank.batched_factors(
            [weight] * matrices, rank, method="chebyshev", warm_starts=[basis] * matrices, tolerance=1e-2
        )
    assert all((f.method, f.passes) == ("warm", 3) for f in factors), factors[0][3:]
    return cost


def model_cost(rank: int, scale: int, with_cuda: bool) -> Cost:
    """Cost of all 224 matrices.

    Launches come from small batches of one and two matrices, because they depend on no size.
    """
    whole = Cost()
    for (m, n), count in SHAPES.items():
        one = refresh((m // scale, n // scale), rank // scale, 1, with_cuda)
        first, second = (refresh((m // 16, n // 16), 8, matrices, with_cuda) for matrices in (1, 2))
        batches = -(-count // max(1, principal.MEMORY_BUDGET // (4 * m * n)))
        for part, quantity in one:
            if quantity == "launches":
                alone, more = first[part, quantity], second[part, quantity] - first[part, quantity]
                whole[part, quantity] += batches * (alone - more) + count * more
            else:
                whole[part, quantity] += count * one[part, quantity]
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    rows = []
    for ops_used in ("twins", "helpers"):  # the references, and the CUDA ops
        cost = model_cost(options.rank, options.scale, ops_used == "helpers")
        for part in PARTS:
            quantities = {quantity: f"{cost[part, quantity]:.4g}" for quantity in QUANTITIES}
            rows.append(
                {"model": "LLaMA-2-7B, 224 matrices", "rank": options.rank, "way": ops_used, "part": part} | quantities
            )
            print(*rows[-1].values(), sep="\t")
    if options.csv:
        results.write_csv(options.csv, [row | {"commit": results.environment()["commit"]} for row in rows])


if __name__ == "__main__":
    main()
