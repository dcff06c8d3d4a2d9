"""The step by `sparse_adamw_` on the CPU, against torch.optim.AdamW(fused=True).

One call steps all matrices. Shape sets: the 210 linear matrices of SmolLM2-135M (or of ``--model``)
with their real masks (exact top 5 % of |W_r|, r = 64), and one 4096 x 4096 and one 4096 x 11008
matrix with a random mask clustered by rows. All candidates of a shape set and dtype share weights
and dense gradients. They are timed in turns. Baselines are torch's fused, foreach and for-loop
AdamW, whose moments have the weight's dtype, and a plain rewrite of the authors' step. ``packed
vector`` is what one would write without this package: fused AdamW on one fp32 vector of all
selected entries, and a scatter into each weight by the fastest of torch's ways (column
``scatter``). Dense gradients are gathered before. ``times_packed_vector`` compares ours with it.

Rows with ``+ refresh/100`` add a hundredth of a refresh of all masks, as LiftAdamW makes it from
the bases of the last one. Rows with ``+ cold refresh/100`` add one without bases. Rows with ``+
refresh/100, skipping`` add the share of it that drift.csv says is refreshed, where there is one.

Every variant is first checked against `lift_kernels.ops.reference`. A wrong one has a row without a
time, and the exit status is 1.

Bytes of the roofline, per step. Sparse: each distinct 64-byte line that selected entries lie on
counts, for weights read and written, for dense gradients read. Each entry counts 4 (index) + 2
moments read and written, with their scales, + 8 (master read and written, 4 for a low half) + a
packed gradient. Dense: weight and
moments are read and written, the gradient is read. The roofline is these bytes over the measured
copy bandwidth.

``lines_per_s``: the lines of weights and dense gradients, each counted once, over the median. Rows
"scattered lines alone" visit these lines and compute nothing, which shows the machine's own rate.
``share_of_lines``: their time over the step's. A share near 1 says that this resource is full.

    python -m bench.bench_sparse_adamw [--model DIR] [--runs 20] [--sets smollm2 4096x4096
        4096x11008] [--tuned] [--out DIR] [--dry-run]
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import plots
from bench.common import results, scattered_lines, timing, tuned
from bench.common.arenas import Arena, clustered_indices
from bench.common.matrices import model_weights
from bench.common.steps import BF16, DENSITY, FP32, RANK, AuthorsStep, PackedVector, SparseStep, dense_step
from bench.common.timing import Candidate
from lift_kernels.masks.principal import MaskRequest, principal_masks
from lift_kernels.ops import dispatch

COLUMNS = [
    "set",
    "variant",
    "median_ms",
    "q25_ms",
    "q75_ms",
    "ratio",
    "times_packed_vector",
    "floor_ms",
    "share_of_floor",
    "share_of_lines",
    "status",
]
VECTOR = {False: "packed vector: gather + AdamW fused + scatter", True: "packed vector: AdamW fused + scatter"}
"""The baseline on packed values, by whether the gradients are packed."""

LINES = {False: "scattered lines alone, dense grads", True: "scattered lines alone, packed grads"}
"""What visits the lines of a step and computes nothing."""

SKIPPING = "refresh, skipping"


def sparse_name(packed: bool, label: str) -> str:
    return f"{'packed' if packed else 'dense'} grads{label}"


def is_ours(variant: str) -> bool:
    return variant.startswith((sparse_name(False, ""), sparse_name(True, "")))


def candidates(
    weights: list[Tensor], arena: Arena, dtype: torch.dtype, context: bool
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates, the baseline first, and the statuses of those that are wrong.

    The sparse ones are checked here. ``context`` adds other steps to compare with.
    """
    weights = [weight.to(dtype, copy=True) for weight in weights]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(w.shape, generator=generator).mul_(1e-3).to(dtype) for w in weights]
    if dtype == FP32:
        kinds = {"": {}, ", 8-bit moments": {"moment": torch.int8}}
    else:
        kinds = {
            ", bf16 moments": {"moment": BF16},
            ", bf16 moments, fp32 master": {"moment": BF16, "master": True},
            ", fp32 moments, fp32 master": {"master": True},
            ", bf16 moments, stochastic": {"moment": BF16, "stochastic": True},
            ", 8-bit moments, fp32 master": {"moment": torch.int8, "master": True},
            ", fp32 moments, split master": {"split": True},
            ", 8-bit moments, split master": {"moment": torch.int8, "split": True},
        }
    numel = sum(w.numel() for w in weights)
    wrong: dict[str, str] = {}
    result = [Candidate("AdamW fused", dense_step(weights, grads, fused=True), 7.0 * numel * dtype.itemsize)]
    for packed in (False, True):
        for label, options in kinds.items():
            sparse = SparseStep(weights, grads, arena, packed=packed, **options)
            if problem := sparse.check():
                wrong[sparse_name(packed, label)] = f"refused, it is wrong: {problem}"
                continue
            result.append(Candidate(sparse_name(packed, label), sparse, sparse.roofline_bytes()))
    for packed, name in VECTOR.items():
        result.append(Candidate(name, PackedVector(weights, grads, arena, packed)))
    if scattered_lines.usable():
        for packed, name in LINES.items():
            lines = scattered_lines.ScatteredLines(weights, None if packed else grads, arena)
            result.append(Candidate(name, lines))
    if context:
        result.append(Candidate("AdamW for-loop", dense_step(weights, grads, foreach=False, fused=False)))
        result.append(Candidate("AdamW foreach", dense_step(weights, grads, foreach=True)))
        result.append(Candidate("published LIFT step", AuthorsStep(weights, grads, arena)))
    return result, wrong


def with_lines(row: dict, candidate: Candidate, times: dict[str, np.ndarray]) -> dict:
    """The row with the columns that only some candidates have."""
    if isinstance(candidate.run, PackedVector):
        return row | {"scatter": candidate.run.scatter}
    if isinstance(candidate.run, scattered_lines.ScatteredLines):
        return row | {"lines_per_s": float(f"{candidate.run.count / np.median(times[candidate.name]):.4g}")}
    if not isinstance(candidate.run, SparseStep):
        return row
    against, own = times[VECTOR[candidate.run.packed]], times[candidate.name]
    alone = times.get(LINES[candidate.run.packed])
    return row | {
        "times_packed_vector": float(f"{np.median(against / own):.4g}"),
        "lines_per_s": float(f"{candidate.run.scattered_lines() / np.median(own):.4g}"),
        "share_of_lines": "" if alone is None else float(f"{np.median(alone / own):.4g}"),
    }


def refresh_seconds(weights: list[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """Index lists, and the seconds of a refresh of all masks, cold and warm; medians of three.

    The warm one starts from the bases of the last.
    """
    cold = [MaskRequest(w, min(RANK, *w.shape), round(DENSITY * w.numel())) for w in weights]
    masks = principal_masks(cold)  # the first touch of new memory is not timed
    warm = [replace(r, basis=m.basis, threshold=m.threshold) for r, m in zip(cold, masks)]
    taken: dict[str, list[float]] = {"cold refresh": [], "refresh": []}
    for _ in range(3):
        for name, requests in (("cold refresh", cold), ("refresh", warm)):
            start = time.perf_counter()
            principal_masks(requests)
            taken[name].append(time.perf_counter() - start)
    return [m.indices for m in masks], {name: float(np.median(values)) for name, values in taken.items()}


def refreshed_share(folder: Path | None) -> float | None:
    """How often a mask is refreshed in 100 steps where masks that stay are skipped.

    It is the mean of the column ``refreshed_share`` of drift.csv, over learning rates. It is a
    property of the training and not of the machine. So a folder beside this one serves as well.
    None where there is no such file or column.
    """
    if folder is None:
        return None
    for path in (folder / "drift.csv", *sorted(folder.parent.glob("*/drift.csv"))):
        if path.exists():
            with path.open(newline="") as file:
                shares = [float(row["refreshed_share"]) for row in csv.DictReader(file) if row.get("refreshed_share")]
            if shares:
                return float(np.mean(shares))
    return None


def shape_set(name: str, model: str | None) -> tuple[list[Tensor], list[Tensor], dict[str, float], str]:
    """Weights, index lists, seconds of refreshes and a description of the masks.

    Without real masks there are no refreshes.
    """
    if name == "smollm2":
        weights = model_weights(model)
        lists, refreshes = refresh_seconds(weights)
        return weights, lists, refreshes, f"top 5 % of |W_r|, r = {RANK}"
    if name == "dry":
        weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((96, 64), (40, 80))]
        lists, refreshes = refresh_seconds(weights)
        return weights, lists, refreshes, f"top 5 % of |W_r|, r = {RANK} or the smaller side"
    m, n = map(int, name.split("x"))
    weights = [torch.randn(m, n, generator=torch.Generator().manual_seed(0)).mul_(0.02)]
    return weights, [clustered_indices(m, n, DENSITY, seed=0)], {}, "random 5 % clustered by rows"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory, GGUF file or hub id in place of the bundled SmolLM2-135M")
    parser.add_argument("--runs", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--sets", nargs="+", default=["smollm2", "4096x4096", "4096x11008"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--no-context", action="store_true", help="leave out the slow baselines and write no files")
    tuned.add_option(parser)
    results.add_output_options(parser)
    arguments = parser.parse_args(argv)
    if not dispatch.backends()["native-cpu"].usable:
        raise SystemExit(f"no native backend: {dispatch.backends()['native-cpu'].reason}")
    sets, runs, mib = (["dry"], 2, 8) if arguments.dry_run else (arguments.sets, arguments.runs, 256)

    folder = None if arguments.no_context else results.output_folder(arguments)
    share = refreshed_share(folder)
    table: list[dict] = []
    for name in sets:
        weights, lists, refreshes, masks = shape_set(name, arguments.model)
        if share is not None and refreshes:
            refreshes[SKIPPING] = share * refreshes["refresh"]
        arena = Arena.of(lists)
        for dtype in arguments.dtypes:
            chosen, wrong = candidates(weights, arena, {"fp32": FP32, "bf16": BF16}[dtype], not arguments.no_context)
            times, bandwidth = timing.time_interleaved_with_copy(chosen, runs, mib=mib)
            labels = {"op": "sparse_adamw_", "set": f"{name}, {dtype}", "masks": masks, "matrices": len(lists)}
            new = results.rows(chosen, times, chosen[0].name, bandwidth, **labels)
            new = [with_lines(row, one, times) | {"status": "ok"} for row, one in zip(new, chosen)]
            sparse = [row for row in new if is_ours(row["variant"])]
            new += [with_refresh(row, new[0], *refresh) for refresh in refreshes.items() for row in sparse]
            new += [labels | {"variant": variant, "status": status} for variant, status in wrong.items()]
            results.show(new, COLUMNS)
            table += [row | results.environment() for row in new]
            del chosen
    if arguments.tuned:
        table += tuned.rows_again("bench.bench_sparse_adamw", "sparse_adamw.csv", argv)
    if folder:
        results.write_csv(folder / "sparse_adamw.csv", table)
        plots.draw("sparse_adamw", folder)
    return results.exit_status(table)


def with_refresh(row: dict, baseline: dict, name: str, seconds: float) -> dict:
    """The row of a sparse step with a hundredth of a refresh added."""
    median = float(f"{row['median_ms'] + 1e3 * seconds / 100:.4g}")
    return row | {
        "variant": f"{row['variant']} + " + (f"{name}/100" if name != SKIPPING else "refresh/100, skipping"),
        "median_ms": median,
        "q25_ms": "",
        "q75_ms": "",
        "ratio": float(f"{baseline['median_ms'] / median:.4g}"),
        "floor_ms": "",
        "share_of_floor": "",
        "times_packed_vector": "",
        "lines_per_s": "",
        "share_of_lines": "",
    }


if __name__ == "__main__":
    raise SystemExit(main())
