"""What one warm refresh of LLaMA-2-7B costs on a GPU: bytes, FLOPs, launches, waits, and a time.

All is computed, not timed. `LiftAdamW.refresh()` runs on fake CUDA tensors of the true shapes
(`bench.common.fake_cuda`), and `bench.common.launch_cost` counts its launches, in the batches that
it makes. `bench.common.predicted_time` has the rates of the predicted time, and says how far off it
was where a card had been timed: an H100 took 320 ms for a warm refresh of an older state of the
code (bench/README.md), and 197 are predicted.

A refresh depends on numbers, which fake tensors lack. Here the iteration converges after one
degree, brackets of thresholds hold, and every entry stays. That is the usual warm refresh. How
eigenproblems are solved depends on the torch that counts (`ops/symmetric_eigen.py`); from 2.12 on
it is one call of torch for each batch.

Rows are counted for weights in bf16 and in fp32, and two ways: with the reference implementations
of the subspace-iteration ops, and with the CUDA ops. The column ``products`` says how the weights
are multiplied: in "bf16", or as "fp32 copies".

    python -m bench.refresh_cost [--rank 128] [--scale 8]
        [--csv bench/results/computed/refresh_cost.csv]

``--csv`` replaces the rows of the same model, weights, products and way, and keeps the others.
``--scale`` divides all sides and the rank for a quick run.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from bench.common import results
from bench.common.device_events import Call, Event
from bench.common.fake_cuda import FakeCuda
from bench.common.launch_cost import QUANTITIES, LaunchCost, Step, is_product, tensors, totals
from bench.common.predicted_time import predicted_seconds
from lift_kernels import LiftAdamW
from lift_kernels.ops import dispatch

SHAPES = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = (
    *("copies and checks of weights", "whole matrices", "tall blocks", "eigenproblems"),
    *("selection", "migration"),
)
TARGET = 0.5  # seconds
SELECTION = ("ops/lowrank_topk.py", "ops/threshold_bracket.py", "ops/triton/lowrank_topk.py")
KEYS = ("model", "rank", "weights", "products", "way")
"""The columns that tell which rows a run replaces."""

CUDA_OPS = {op: next(name for name in names if name != "native-cpu") for op, names in dispatch.OPS.items()}
"""The backend of each op where all are usable on a GPU."""
WAYS = {
    "references": CUDA_OPS | dict.fromkeys(("gaussian_sketch_", "cholesky_qr_", "chebyshev_step_"), "reference"),
    "cuda ops": CUDA_OPS,
}


class Part:
    """Says which part of a refresh a launch or a wait belongs to.

    Args:
        shapes: of the weights.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self._numels = {m * n for m, n in shapes}

    def __call__(self, event: Event, call: Call | None) -> str:
        frames = event.frames
        if any(frame in SELECTION for frame in frames) or frames[:1] == ("masks/principal.py",):
            return "selection"
        if not any(frame.startswith("masks/") for frame in frames):
            return "migration"
        if "ops/symmetric_eigen.py" in frames:
            return "eigenproblems"
        whole = call is not None and self._has_a_whole_matrix(call)
        if whole and call is not None and is_product(call):
            return "whole matrices"
        return "copies and checks of weights" if whole or frames[0] == "masks/lowrank.py" else "tall blocks"

    def _has_a_whole_matrix(self, call: Call) -> bool:
        return any(
            t.dim() > 1 and t.shape[-2] * t.shape[-1] in self._numels
            for t in tensors((call.args, call.kwargs, call.out))
        )


def warm_refresh(shapes: Mapping[tuple[int, int], int], rank: int, dtype: torch.dtype, way: str) -> list[Step]:
    """The launches and waits of a warm refresh of matrices of these shapes, by part.

    Raises RuntimeError where a matrix did not converge after one degree of a warm start.
    """
    with FakeCuda(WAYS[way]) as cuda:
        weights = [
            nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda"))
            for shape, count in shapes.items()
            for _ in range(count)
        ]
        optimizer = LiftAdamW(weights, rank=rank, refresh_interval=None)
        optimizer.refresh()  # the first masks
        optimizer.refresh()  # uploads tables that stay
        cost = LaunchCost(Part(list(shapes)))
        with cuda.recording(cost):
            optimizer.refresh()
        report = optimizer.last_refresh
        passes = 4 if dtype == torch.float32 else 3  # The last product in TF32 is made again, in fp32.
        wrong = [matrix for matrix in report.matrices if (matrix.method, matrix.passes) != ("warm", passes)]
        if wrong:
            raise RuntimeError(f"not a warm refresh of one degree: {wrong[0]}")
    return cost.steps


def rows_of(steps: Sequence[Step], model: str, rank: int, weights: str, way: str) -> list[dict]:
    """A CSV row for each part of a refresh, and one for all of it."""
    sums, seconds = totals(steps), predicted_seconds(steps)
    products = "bf16" if sums["whole matrices", "bf16_flops"] else "fp32 copies"
    for quantity in QUANTITIES:
        sums["all", quantity] = sum(sums[part, quantity] for part in PARTS)
    seconds["all"] = sum(seconds[part] for part in PARTS)
    return [
        {"model": model, "rank": rank, "weights": weights, "products": products, "way": way, "part": part}
        | {quantity: f"{sums[part, quantity]:.4g}" for quantity in QUANTITIES}
        | {"predicted_ms": f"{1e3 * seconds[part]:.4g}"}
        for part in (*PARTS, "all")
    ]


def verdict(rows: Sequence[dict]) -> str:
    """A line on the predicted time of a whole refresh, the last of its rows."""
    row = rows[-1]
    milliseconds = float(row["predicted_ms"])
    under = "under" if milliseconds < 1e3 * TARGET else "not under"
    return (
        f"A warm refresh of {row['model']}, {row['weights']} weights multiplied in {row['products']}, {row['way']}: "
        f"{milliseconds:.0f} ms predicted, {under} {TARGET} s"
    )


def merged(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """The rows of both, without those old ones that the new ones replace."""

    def key(row: dict) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in KEYS)

    replaced = {key(row) for row in new}
    return [row for row in old if key(row) not in replaced] + list(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    shapes = {(m // options.scale, n // options.scale): count for (m, n), count in SHAPES.items()}
    model = "LLaMA-2-7B, 224 matrices" + (f", sides / {options.scale}" if options.scale > 1 else "")
    rank = options.rank // options.scale
    found: list[dict] = []
    for weights, dtype in DTYPES.items():
        for way in WAYS:
            steps = warm_refresh(shapes, rank, dtype, way)
            new = rows_of(steps, model, rank, weights, way)
            results.show(new, ["part", *QUANTITIES, "predicted_ms"])
            print(verdict(new) + "\n")
            found += new
    if options.csv:
        commit = results.environment()["commit"]
        old = []
        if options.csv.is_file():
            with options.csv.open(newline="") as file:
                old = list(csv.DictReader(file))
        results.write_csv(options.csv, merged(old, [row | {"commit": commit} for row in found]))


if __name__ == "__main__":
    main()
