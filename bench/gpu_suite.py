"""Two commands for a machine with a GPU: one builds and tests, one times everything.

    python bench/gpu_suite.py --part check --out FOLDER
        at most 5 minutes on 16 cores: extension, gpu tests, compute-sanitizer
    python bench/gpu_suite.py --part time --out FOLDER
        at most 7 minutes: timings
    python bench/gpu_suite.py --part experiments --out FOLDER
        at most 3 minutes: settings that may be faster, not a part of the timings
    python bench/gpu_suite.py --dry-run
        both on the CPU, with tiny shapes and without build; no limit of time

Each writes ``FOLDER/gpu_check.csv`` or ``gpu_time.csv`` with a log beside it, and prints a table of
all rows last. Without ``--part`` time follows check. ``--only STAGE ...`` takes some stages.
``--commit HASH`` names that of a checkout without git.

Every stage of `STAGES` runs in a process of its own. Its budget is a limit after which the process
and its children are killed. A stage that fails, hangs or crashes the card leaves a row that says
so, and the others go on. What a stage has measured by then stays. Every variant is checked before
it is timed. A wrong one is refused, and its row says why.

The module of a stage in bench/gpu_parts says how it counts its roofline and checks its results.
bench/gpu_parts/runner.py says how time is taken. Needed are torch, triton, numpy, pytest and ninja,
and a plain checkout. No network is needed. nvcc and compute-sanitizer are used when present, and
named when missing.

Columns: ``median_ms``, quartiles, extremes and ``repeats`` of the time on the card. ``host_ms``:
what a call costs the host. ``ratio``: seconds of ``baseline`` over its own. ``floor_ms``: the
roofline, the time of its bytes or FLOPs (``floor_of``) at the rates that the stage ``machine``
measured. ``share_of_floor``. ``tests``: the status of the gpu tests, of this run or of the check in
FOLDER. The rest says where it ran: device, versions, commit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started as a script: start again as a module of this checkout
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    module = [sys.executable, "-P", "-m", "bench.gpu_suite", *sys.argv[1:]]
    os.execve(sys.executable, module, os.environ | {"PYTHONPATH": path})

import torch

from bench import ROOT
from bench.common import results
from bench.gpu_parts.runner import Run, environment, one_line

WHOLE = "(whole stage)"


@dataclass(frozen=True)
class Stage:
    """A stage and its limit.

    ``target``: module:function, called with a `Run`. ``budget``: seconds for the whole process,
    imports included.
    """

    name: str
    target: str
    budget: float


STAGES = {
    "check": [
        Stage("build", "bench.gpu_parts.preflight:build", 45),
        Stage("tests", "bench.gpu_parts.preflight:tests", 180),
        Stage("sanitizer", "bench.gpu_parts.preflight:sanitizer", 75),
    ],
    "time": [
        Stage("machine", "bench.gpu_parts.machine:work", 15),
        Stage("step LLaMA-2-7B", "bench.gpu_parts.step:llama2", 35),
        Stage("step Llama-3-8B", "bench.gpu_parts.step:llama3", 35),
        Stage("packed ops", "bench.gpu_parts.packed_ops:work", 30),
        Stage("gradients", "bench.gpu_parts.weight_grads:work", 30),
        Stage("selection", "bench.gpu_parts.masks:selection", 25),
        Stage("bitmaps", "bench.gpu_parts.bitmaps:work", 20),
        Stage("refresh", "bench.gpu_parts.masks:refresh", 40),
        Stage("factorizations", "bench.gpu_parts.factorizations:work", 25),
        Stage("training", "bench.gpu_parts.training:work", 65),
        Stage("training 7B", "bench.gpu_parts.training:large", 75),
    ],
    "experiments": [
        Stage("machine", "bench.gpu_parts.machine:work", 15),
        Stage("experiments", "bench.gpu_parts.experiments:work", 150),
    ],
}
LIMITS_S = {"check": 300, "time": 395, "experiments": 180}
NAMED_ONLY = {"experiments"}
"""Parts that run only when ``--part`` names them."""
SUMMARY = [
    "stage",
    "variant",
    "model",
    "dtype",
    "shape",
    "median_ms",
    "host_ms",
    "ratio",
    "floor_of",
    "share_of_floor",
    "status",
]


def run_stage(stage: Stage, device: str, rows: Path, deadline: float, rates: dict[str, float]) -> int:
    """Run a stage in its own process. Returns the exit status.

    ``deadline``: of `time.monotonic`, which all processes share.
    """
    run = Run(stage.name, device, rows, deadline, repeats=3 if device == "cpu" else 20, rates=rates)
    torch.manual_seed(0)
    if run.dry:
        torch.set_num_threads(1)
    try:
        module, function = stage.target.split(":")
        getattr(importlib.import_module(module), function)(run)
    except Exception as error:  # reported in a row and in the stage's exit status
        import traceback

        traceback.print_exc()
        run.add("the rest", status=f"failed: {one_line(error)}")
        return 1
    return 0


def ended(process: subprocess.Popen, deadline: float) -> bool:
    """Wait for a stage. Returns whether it ended before the deadline."""
    try:
        process.wait(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


class Suite:
    """The parent of the stages of one part. It uses no card itself.

    It starts them, collects their rows, and writes the CSV again after each.
    """

    def __init__(self, part: str, out: Path, dry: bool, commit: str | None = None):
        out.mkdir(parents=True, exist_ok=True)
        self.part, self.csv, self.log = part, out / f"gpu_{part}.csv", out / f"gpu_{part}.log"
        self.checked = out / "gpu_check.csv"
        self.log.write_bytes(b"")
        self.dry, self.found, self.lock = dry, {}, threading.Lock()
        self.environment = environment("cpu") | {"device": "not asked"}  # until a stage has said more
        self.commit = {"commit": commit or self.environment["commit"]}

    def say(self, text: str) -> None:
        """To the screen and the log."""
        with self.lock, self.log.open("a") as file:
            print(text, flush=True)
            file.write(text + "\n")

    def run(self, stages: list[Stage]) -> bool:
        """Run one after the other. Returns whether all were green.

        In the dry run two run at a time, after the first.
        """
        together = "no limit" if self.dry else f"{sum(stage.budget for stage in stages):g} of {LIMITS_S[self.part]}"
        self.say(
            f"{self.part}, budgets in seconds: {', '.join(f'{s.name} {s.budget:g}' for s in stages)}; "
            f"together {together}"
        )
        self.found = {stage.name: [] for stage in stages}
        self.run_one(stages[0])  # what it builds or measures, the others use
        with ThreadPoolExecutor(2 if self.dry else 1) as pool:
            list(pool.map(self.run_one, stages[1:]))
        with contextlib.redirect_stdout(io.StringIO()) as table:
            results.show([{k: str(v)[:60] for k, v in row.items()} for row in self.rows], SUMMARY)
        self.say(f"\n{table.getvalue()}\n{self.csv}, {self.log}")
        return all(row["status"] == "ok" for row in self.rows if row["variant"] == WHOLE)

    def run_one(self, stage: Stage) -> None:
        """Run one stage in a process group of its own. A row for all of it comes last."""
        budget = math.inf if self.dry else stage.budget  # the time of a dry run says nothing
        self.say(f"--- {stage.name}, at most {budget:g} s")
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.touch()
            given = json.dumps(
                {
                    "stage": vars(stage),
                    "device": "cpu" if self.dry else "cuda",
                    "rows": str(path),
                    "deadline": start + budget,
                    "rates": self.rates(),
                }
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu_suite", "--child", given],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            reader = threading.Thread(
                target=lambda: [self.say(line.rstrip("\n")) for line in process.stdout], daemon=True
            )
            reader.start()
            try:
                in_time = ended(process, start + budget)
            finally:
                end_group(process)  # also what the stage has left behind
            reader.join(5)
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        status = f"killed after {budget:g} s"
        if in_time:
            status = "ok" if process.returncode == 0 else f"failed: exit status {process.returncode}"
        for noted in (row for row in rows if "environment" in row):
            self.environment = noted["environment"]
        rows = [row for row in rows if "environment" not in row]
        bad = sum(row["status"].startswith(("failed", "refused", "killed")) for row in rows)
        if status == "ok" and bad:
            status = f"failed: {bad} of {len(rows)} rows"
        whole = {"stage": stage.name, "variant": WHOLE, "status": status, "seconds": round(time.monotonic() - start, 1)}
        self.found[stage.name] = [*rows, whole | ({} if self.dry else {"budget_s": budget})]
        self.write()

    @property
    def rows(self) -> list[dict]:
        return [row for rows in self.found.values() for row in rows]

    def rates(self) -> dict[str, float]:
        return {row["rate_name"]: row["rate"] for row in self.rows if "rate_name" in row}

    def tests(self) -> str:
        """Status of the gpu tests in this run, or in the check of this commit in the folder."""
        rows = self.rows
        if self.part != "check" and self.checked.exists():
            with self.checked.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["commit"] == self.commit["commit"]]
        return next((row["status"] for row in rows if row["variant"] == "gpu tests"), "not run")

    def write(self) -> None:
        """Write all rows so far, with where they come from and the status of the tests."""
        rates = {f"{name}_rate": float(f"{rate:.4g}") for name, rate in self.rates().items()}
        last = {"tests": self.tests()} | self.environment | self.commit | rates
        with self.lock, contextlib.redirect_stdout(io.StringIO()):
            results.write_csv(self.csv, [row | last for row in self.rows])


def end_group(process: subprocess.Popen) -> None:
    """Kill a stage and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass  # stuck in the driver: the next stage does not wait for it


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when every stage was green."""
    names = list(dict.fromkeys(stage.name for stages in STAGES.values() for stage in stages))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=STAGES, help="one of them; without it check and time")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of CSVs and logs")
    parser.add_argument("--only", nargs="+", choices=names, help="these stages alone")
    parser.add_argument("--commit", help="of a checkout without git")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, without build, tests and sanitizer"
    )
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        child = given.child
        return run_stage(
            Stage(**child["stage"]), child["device"], Path(child["rows"]), child["deadline"], child["rates"]
        )
    if not given.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run tries the suite on the CPU")
    green = True
    for part in [given.part] if given.part else [part for part in STAGES if part not in NAMED_ONLY]:
        stages = [stage for stage in STAGES[part] if not given.only or stage.name in given.only]
        if stages:
            green &= Suite(part, given.out, given.dry_run, given.commit).run(stages)
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
