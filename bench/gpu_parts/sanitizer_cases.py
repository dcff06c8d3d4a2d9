"""Every native CUDA op once at small, awkward sizes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python -m bench.gpu_parts.sanitizer_cases cuda [OP ...]
        (without a card: cpu; without an op: all)

Tensors are made on the CPU and compared there, so that on the card little else runs than the ops
and copies. To add an op, add one line to `CASES`: its name and a function of the device that
returns what is wrong, or an empty string.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu_parts import bitmaps
from lift_kernels import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 31, 257, 1000)  # entries, around the sizes of warps and blocks


def backend(device: str) -> str:
    return "native-cuda" if device == "cuda" else "native-cpu"


def subspace_backend(device: str) -> str:
    """Of the subspace-iteration ops, which have no C++ version for the CPU."""
    return "native-cuda" if device == "cuda" else "reference"


def positions(count: int, numel: int, seed: int = 0) -> Tensor:
    """Sorted unique int32 positions."""
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values.int()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def differs(got: Tensor, right: Tensor, label: str) -> str:
    return "" if torch.equal(got.cpu(), right) else f"{label}: results differ from the reference"


def far(got: Tensor, right: Tensor, tolerance: float, label: str) -> str:
    """Results that may differ by rounding, relative to the largest entry."""
    error, largest = float((got.cpu().double() - right.double()).abs().max()), float(right.abs().max())
    return (
        ""
        if error <= tolerance * max(largest, 1e-30)
        else f"{label}: off by {error:.3g}, the largest entry is {largest:.3g}"
    )


def packed_gather(device: str) -> str:
    for dtype in DTYPES:
        for count in COUNTS:
            source, index = normal(37, 41, dtype=dtype), positions(count, 37 * 41)
            for out in DTYPES:
                got = ops.packed_gather(source.to(device), index.to(device), dtype=out, backend=backend(device))
                right = ops.packed_gather(source, index, dtype=out, backend="reference")
                if problem := differs(got, right, f"{count} entries, {dtype} to {out}"):
                    return problem
    return ""


def packed_scatter(device: str) -> str:
    for dtype in DTYPES:
        for count in COUNTS:
            values, index = normal(count), positions(count, 37 * 41)
            got, right = normal(37, 41, dtype=dtype).to(device), normal(37, 41, dtype=dtype)
            ops.packed_scatter_(got, index.to(device), values.to(device), backend=backend(device))
            ops.packed_scatter_(right, index, values, backend="reference")
            if problem := differs(got, right, f"{count} entries into {dtype}"):
                return problem
    return ""


def packed_migrate(device: str) -> str:
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for old_count in (0, *COUNTS):
            for new_count in COUNTS:
                old, new = positions(old_count, 1517), positions(new_count, 1517, seed=2)
                values = (100 * normal(old_count)).to(dtype)
                lists = (t.to(device) for t in (values, old, new))
                got = ops.packed_migrate(*lists, fill=3, backend=backend(device))
                right = ops.packed_migrate(values, old, new, fill=3, backend="reference")
                if problem := differs(got, right, f"{old_count} to {new_count} entries of {dtype}"):
                    return problem
    return ""


def gaussian_sketch(device: str) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1, 1, 1), (2, 33, 7), (3, 64, 20)):
            options = {"seed": 5, "first": 2, "dtype": dtype}
            got = ops.gaussian_sketch(*shape, **options, device=device, backend=subspace_backend(device))
            right = ops.gaussian_sketch(*shape, **options, backend="reference")
            if problem := far(got, right, 1e-5 if dtype == torch.float32 else 2.0**-6, f"sketch {shape} of {dtype}"):
                return problem
    return ""


# Around the widths of tiles, the rows of slabs and the threads of a block.
BLOCKS = ((1, 1, 1), (2, 33, 7), (3, 600, 64), (2, 530, 65), (1, 1100, 130), (1, 290, 270))


def cholesky_qr(device: str) -> str:
    for shape in BLOCKS:
        for rounds in (1, 2):
            results = []
            for place, name in ((device, subspace_backend(device)), ("cpu", "reference")):
                block, other = normal(*shape).to(place), normal(shape[0], 5, shape[2]).to(place)
                status = ops.cholesky_qr_(block, other, rounds=rounds, backend=name)
                results.append((block, other, status))
            for got, right in zip(*results):
                if problem := far(got, right, 1e-3, f"block {shape}, {rounds} rounds"):
                    return problem
    return ""


def chebyshev_step(device: str) -> str:
    for shape in BLOCKS:
        for again in (False, True):
            results = []
            for place, name in ((device, subspace_backend(device)), ("cpu", "reference")):
                product, block, previous = (normal(*shape, seed=seed).to(place) for seed in (1, 2, 3))
                edge = torch.full((shape[0],), 2.0, device=place)
                raised, status = ops.chebyshev_step_(product, block, previous if again else None, edge, backend=name)
                results.append((raised, block, status))
            for got, right in zip(*results):
                if problem := far(got, right, 1e-3, f"blocks {shape}{', with a previous one' if again else ''}"):
                    return problem
    return ""


def bitmap_to_indices(device: str) -> str:
    for m, n in ((1, 33), (40, 70), (300, 257)):
        for k in (1, m * n // 20 + 1, m * n // 2):
            given = bitmaps.arguments(normal(m, n).abs_(), k)
            got = ops.bitmap_to_indices(
                *(x.to(device) if isinstance(x, Tensor) else x for x in given), backend=subspace_backend(device)
            )
            right = ops.bitmap_to_indices(*given, backend="reference")
            for found, expected in zip(got, right):
                if problem := differs(found, expected, f"{k} of {m} x {n}"):
                    return problem
    return ""


CASES: list[tuple[str, Callable[[str], str]]] = [
    ("packed_gather", packed_gather),
    ("packed_scatter_", packed_scatter),
    ("packed_migrate", packed_migrate),
    ("gaussian_sketch_", gaussian_sketch),
    ("cholesky_qr_", cholesky_qr),
    ("chebyshev_step_", chebyshev_step),
    ("bitmap_to_indices", bitmap_to_indices),
]


def main(device: str, *chosen: str) -> int:
    """Run the chosen cases, or all. Returns the number of wrong ops."""
    wrong = 0
    for name, case in CASES:
        if chosen and name not in chosen:
            continue
        problem = case(device)
        wrong += bool(problem)
        print(f"{name}: {problem or 'right'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
