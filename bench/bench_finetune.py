"""The default fine-tuning job with each method: quality before and after, bytes, seconds.

Also the delta file of the LIFT run. Every method is one run of ``python -m lift_kernels finetune``
in a process of its own, one after the other, with the defaults of the command. What is before
training (model, problems, prompt) is the same for all. A run that fails has a row whose ``status``
says so, and the exit status is 1. The first row's exact match before training must be that of all
others. Otherwise the runs are not comparable, and they are refused. There is no roofline: forward
and backward passes, the most of it, are torch's.

    python -m bench.bench_finetune [--methods lift random lora full] [--eval-problems 300]
        [--steps 60] [--out DIR]    (25 minutes)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import ROOT
from bench.common import results
from lift_kernels import delta_info

COLUMNS = {  # of the CSV: keys of report.json
    "exact_before": "exact_match.before",
    "exact_after": "exact_match.after",
    "exact_low": "exact_match.after_low",
    "exact_high": "exact_match.after_high",
    "exact_before_low": "exact_match.before_low",
    "exact_before_high": "exact_match.before_high",
    "problems": "exact_match.problems",
    "loss_before": "heldout_loss.before",
    "loss_after": "heldout_loss.after",
    "neutral_before": "neutral_loss.before",
    "neutral_after": "neutral_loss.after",
    "entries": "entries",
    "density": "density",
    "state_bytes": "optimizer_state_bytes.measured",
    "dense_state_bytes": "optimizer_state_bytes.dense",
    "extra_bytes": "extra_bytes.measured",
    "extra_bytes_an_entry": "extra_bytes.an_entry",
    "forward_backward_s": "seconds.forward_backward",
    "step_s": "seconds.step",
    "refresh_s": "seconds.refresh",
    "total_s": "seconds.total",
    "model": "model.name",
    "dtype": "settings.dtype",
    "steps": "settings.steps",
    "seed": "settings.seed",
}
Run = Callable[..., Path]


def command(*arguments: str) -> float:
    """Seconds of ``python -m lift_kernels ...``.

    RuntimeError with its last line of output when it fails.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lift_kernels", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1][:160])
    return time.perf_counter() - start


def finetune(method: str, folder: Path, options: Sequence[str]) -> Path:
    """The directory of a run."""
    command("finetune", "--method", method, "--output", str(folder), "--name", method, "--save-steps", "0", *options)
    return folder / method


def delta_row(run: Path) -> dict[str, object]:
    """Columns of the delta file between the base model and the run's.

    The command line makes, applies and reverts it.
    """
    from safetensors.torch import load_file

    delta, tuned, base = run / "tuned.delta", run / "tuned", run / "base"
    made = command("delta", "make", str(run / "model"), str(delta))
    applied = command("delta", "apply", str(delta), str(tuned))
    reverted = command("delta", "revert", str(tuned), str(delta), str(base))
    trained, again = (load_file(directory / "model.safetensors") for directory in (run / "model", tuned))
    if any(not torch.equal(weight, again[name]) for name, weight in trained.items()):
        raise RuntimeError("the delta does not give the trained weights")
    return {
        "delta_entries": delta_info(delta).entries,
        "delta_bytes": delta.stat().st_size,
        "model_bytes": sum(weight.nbytes for weight in trained.values()),
        "delta_make_s": round(made, 2),
        "delta_apply_s": round(applied, 2),
        "delta_revert_s": round(reverted, 2),
    }


def rows(methods: Sequence[str], folder: Path, options: Sequence[str], run: Run = finetune) -> list[dict]:
    """One row per method, those that were refused included."""
    table: list[dict] = []
    for method in methods:
        row: dict[str, object] = {"op": "main job", "variant": method}
        try:
            directory = run(method, folder, options)
            report = json.loads((directory / "report.json").read_text())
            row |= {column: report.get(key, "") for column, key in COLUMNS.items()}
            before = [other["exact_before"] for other in table if "exact_before" in other]
            if before and row["exact_before"] != before[0]:
                raise RuntimeError(
                    f"exact match before training is {row['exact_before']}, of the first run {before[0]}"
                )
            if method == "lift":
                row |= delta_row(directory)
            row["status"] = "ok"
        except (RuntimeError, OSError) as error:
            row = {"op": "main job", "variant": method, "status": f"refused: {error}"}
        table.append(row)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["lift", "random", "lora", "full"])
    parser.add_argument("--eval-problems", type=int, default=300)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="folder for the file in place of bench/results/<device>-<level>")
    arguments = parser.parse_args(argv)
    options = ["--eval-problems", str(arguments.eval_problems), "--steps", str(arguments.steps)]
    with tempfile.TemporaryDirectory() as folder:
        table = [row | results.environment() for row in rows(arguments.methods, Path(folder), options)]
    results.show(table, ["variant", "loss_after", "exact_after", "neutral_after", "state_bytes", "total_s", "status"])
    results.write_csv((arguments.out or results.results_folder()) / "main_job.csv", table)
    return int(any(row["status"] != "ok" for row in table))


if __name__ == "__main__":
    raise SystemExit(main())
