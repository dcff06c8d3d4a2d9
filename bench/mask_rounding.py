"""Masks from products that are rounded as a GPU rounds them. Nothing is timed.

A GPU multiplies bf16 weights in bf16 and fp32 weights in TF32. Here the iteration runs on the CPU,
and every factor of a product loses the digits that it would lose there: bf16 rounds to nearest,
TF32 cuts 13 bits off. Sums stay in fp32. `WAYS` are compared on the linear matrices of
SmolLM2-135M, in bf16, at 5 % of the entries:

- ``fp32``: nothing is rounded.
- ``TF32``: as for fp32 weights, of the same values. The last product is exact.
- ``bf16, one term``: the weights in bf16, and so each block that they are multiplied with.
- ``bf16, two terms``: as for bf16 weights. Blocks are sums of two bf16 terms, images A X of one.

Small products, of blocks with blocks, are TF32 in all but the first. Every matrix is iterated, also
where the exact method would be faster. Overlap and captured share are those of `bench.bench_masks`.
Warm starts: noise of 3 % of their root mean square moves the selected entries, and the bases are
those of the masks before.

    python -m bench.mask_rounding [--ranks 64 32] [--every 1]
        [--csv bench/results/computed/mask_rounding.csv]

``--every 7`` takes every seventh matrix. The exit status is 1 when the way of bf16 weights misses
`LEAST` or captures less than `CAPTURED` of any matrix.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench.common import results
from bench.common.matrices import weights_of
from lift_kernels import ops
from lift_kernels.masks import chebyshev, lowrank
from lift_kernels.masks.lowrank import LowRankFactors, batched_factors

WAYS = ("fp32", "TF32", "bf16, one term", "bf16, two terms")
LEAST = {64: 0.995, 32: 0.993}
"""Mean overlap that a rank needs."""
CAPTURED = 0.9995
DENSITY, MOVED = 0.05, 0.03


def tf32(x: Tensor) -> Tensor:
    """fp32 numbers without the 13 bits that TF32 lacks."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def rounded(way: str) -> Iterator[None]:
    """Let factors on the CPU have the digits of one of the `WAYS`."""
    if way == "fp32":
        yield
        return
    whole, dtype = chebyshev.product, torch.float32 if way == "TF32" else torch.bfloat16

    def product(a: Tensor, b: Tensor) -> Tensor:
        return whole(a, b) if a.dtype == torch.bfloat16 else tf32(a) @ tf32(b)

    stubs = {
        "product": product,
        "squared_lengths": lambda image: product(image.mT, image).diagonal(dim1=1, dim2=2),
        "image_is_coarse": lambda tall: way == "TF32",
    }
    if way == "bf16, one term":
        stubs["image_of"] = product
    with (
        mock.patch.multiple(chebyshev, **stubs),
        mock.patch.object(lowrank, "factored_dtype", lambda weight: dtype),
    ):
        yield


def mask(factors: LowRankFactors) -> Tensor:
    k = round(DENSITY * factors.left.shape[0] * factors.right.shape[0])
    return ops.lowrank_topk(factors.left, factors.right, k)[0].long()


def quality(found: Tensor, exact: LowRankFactors) -> tuple[float, float]:
    """Overlap with the exact mask, and captured share."""
    best, magnitude = mask(exact), (exact.left @ exact.right.T).abs().flatten().double()
    overlap = float(torch.isin(found, best).double().mean())
    return overlap, float(magnitude[found].sum() / magnitude[best].sum())


def moved(weight: Tensor, entries: Tensor, generator: torch.Generator) -> Tensor:
    """A bf16 matrix after noise on its selected entries."""
    flat = weight.float().flatten()
    noise = torch.randn(len(entries), generator=generator)
    flat[entries] += MOVED * flat[entries].square().mean().sqrt() * noise
    return flat.view(weight.shape).bfloat16()


def compare(weights: Sequence[Tensor], rank: int, way: str) -> list[dict]:
    """A row for cold and one for warm starts of bf16 matrices."""
    generator, taken = torch.Generator().manual_seed(1), {"cold": [], "warm": []}  # type: ignore[var-annotated]
    for weight in weights:
        basis = None
        for start in taken:
            (exact,) = batched_factors([weight], rank, method="gram")
            with rounded(way):
                (factors,) = batched_factors([weight], rank, method="chebyshev", warm_starts=[basis])
            found = mask(factors)
            taken[start].append((*quality(found, exact), factors.passes, factors.converged))
            weight, basis = moved(weight, found, generator), factors.basis
    return [row(rank, way, start, measured) for start, measured in taken.items()]


def row(rank: int, way: str, start: str, measured: Sequence[tuple]) -> dict:
    overlap, captured, passes, converged = (torch.tensor(column, dtype=torch.float64) for column in zip(*measured))
    status = "ok"
    if way == WAYS[-1] and (overlap.mean() < LEAST.get(rank, 0.0) or captured.min() < CAPTURED):
        status = f"too coarse: overlap {overlap.mean():.5f}, captured {captured.min():.5f}"
    return {
        "set": "SmolLM2-135M",
        "matrices": len(measured),
        "rank": rank,
        "products": way,
        "start": start,
        "overlap_mean": f"{overlap.mean():.5f}",
        "overlap_min": f"{overlap.min():.4f}",
        "captured_mean": f"{captured.mean():.6f}",
        "captured_min": f"{captured.min():.6f}",
        "passes": f"{passes.mean():.2f}",
        "converged": int(converged.sum()),
        "status": status,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--every", type=int, default=1, help="take every n-th matrix")
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args(argv)
    weights = [weight.bfloat16() for weight in weights_of("smollm2")[:: options.every]]
    rows = [row for rank in options.ranks for way in WAYS for row in compare(weights, rank, way)]
    results.show(rows, list(rows[0]))
    if options.csv:
        commit = results.environment()["commit"]
        results.write_csv(options.csv, [row | {"commit": commit} for row in rows])
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
