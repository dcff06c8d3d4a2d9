"""One command for a machine with a GPU: build, test, sanitize, then time everything. One CSV, one log, under 8 minutes.

Every part of `PARTS` runs in a process of its own, with a budget after which the process and its children are killed; a part that
fails, hangs or crashes the card leaves a row that says so, and the others go on. What a part has measured by then stays. The last
thing printed is a table of all rows. Every variant is checked before it is timed; a wrong one is refused, and its row says why.
How each part counts its floor and checks its results stands in its module (bench/gpu_parts/), how time is taken in
gpu_parts/report.py. Needs torch, triton, numpy, pytest and ninja, a plain checkout, no network; nvcc and compute-sanitizer are used
when present, and named when missing.

Columns: ``median_ms``, quartiles, extremes and ``repeats`` of the time on the card; ``host_ms`` what a call costs the host;
``ratio``: seconds of ``baseline`` over its own; ``floor_ms``: the time of its bytes or FLOPs (``floor_of``) at the rates that the
part ``machine`` measured; ``share_of_floor``; ``tests``: what the gpu tests of this run said; where it ran, versions, commit.

    python bench/gpu_suite.py --out FOLDER [--only PART ...] [--commit HASH]     (--dry-run: tiny shapes on the CPU, no build)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
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

import bench_util
import torch
from gpu_parts.report import Run, environment, one_line

LIMIT_S = 480
WHOLE = "(whole part)"


@dataclass(frozen=True)
class Part:
    """``target``: module:function, called with a `Run`; ``budget``: seconds for the whole process."""

    name: str
    target: str
    budget: float


PARTS = [
    Part("build", "gpu_parts.checks:build", 55),
    Part("machine", "gpu_parts.report:machine", 15),
    Part("tests", "gpu_parts.checks:tests", 85),
    Part("sanitizer", "gpu_parts.checks:sanitizer", 40),
    Part("step LLaMA-2-7B", "gpu_parts.step:llama2", 40),
    Part("step Llama-3-8B", "gpu_parts.step:llama3", 40),
    Part("packed ops", "gpu_parts.packed:work", 22),
    Part("gradients", "gpu_parts.grads:work", 30),
    Part("selection", "gpu_parts.masks:selection", 20),
    Part("bitmaps", "gpu_parts.bitmaps:work", 10),
    Part("refresh", "gpu_parts.masks:refresh", 60),
    Part("factorizations", "gpu_parts.factors:work", 20),
    Part("training", "gpu_parts.train:work", 35),
]
DRY_BUDGET = 30.0
SUMMARY = ["part", "variant", "model", "dtype", "shape", "median_ms", "host_ms", "ratio", "floor_of", "share_of_floor", "status"]


def run_part(part: Part, device: str, rows: Path, budget: float, rates: dict[str, float]) -> int:
    """In the part's own process; the exit status."""
    run = Run(part.name, device, rows, time.monotonic() + budget, repeats=3 if device == "cpu" else 20, rates=rates)
    torch.manual_seed(0)
    if run.dry:
        torch.set_num_threads(1)
    try:
        module, function = part.target.split(":")
        getattr(importlib.import_module(module), function)(run)
    except Exception as error:  # told in a row and in the part's exit status
        import traceback

        traceback.print_exc()
        run.add("the rest", status=f"failed: {one_line(error)}")
        return 1
    return 0


class Suite:
    """The parts' parent: starts them, collects rows, writes the CSV anew after each. It never touches the card itself."""

    def __init__(self, out: Path, dry: bool, commit: str | None = None):
        out.mkdir(parents=True, exist_ok=True)
        self.csv, self.log = out / "gpu_suite.csv", out / "gpu_suite.log"
        self.log.write_bytes(b"")
        self.dry, self.found, self.lock = dry, {}, threading.Lock()
        self.environment = environment("cpu") | {"device": "not asked"}  # until a part has said more
        self.commit = {"commit": commit or self.environment["commit"]}

    def say(self, text: str) -> None:
        """To the screen and the log."""
        with self.lock, self.log.open("a") as file:
            print(text, flush=True)
            file.write(text + "\n")

    def run(self, parts: list[Part]) -> None:
        """One after the other; two at a time in the dry run, whose timings mean nothing."""
        self.found = {part.name: [] for part in parts}
        with ThreadPoolExecutor(2 if self.dry else 1) as pool:
            list(pool.map(self.run_one, parts))

    def run_one(self, part: Part) -> None:
        """One part in a process group of its own; its rows, then one for the whole of it."""
        budget = min(part.budget, DRY_BUDGET) if self.dry else part.budget
        self.say(f"--- {part.name}, at most {budget:g} s")
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.touch()
            given = json.dumps({"part": vars(part), "device": "cpu" if self.dry else "cuda", "rows": str(path), "budget": budget,
                                "rates": self.rates()})  # fmt: skip
            process = subprocess.Popen([sys.executable, Path(__file__).resolve(), "--child", given], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                       start_new_session=True)  # fmt: skip
            reader = threading.Thread(target=lambda: [self.say(line.rstrip("\n")) for line in process.stdout], daemon=True)
            reader.start()
            try:
                code = process.wait(budget)
                status = "ok" if code == 0 else f"failed: exit status {code}"
            except subprocess.TimeoutExpired:
                status = f"killed after {budget:g} s"
            finally:
                end_group(process)  # also what the part has left behind
            reader.join(5)
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for noted in (row for row in rows if "environment" in row):
            self.environment = noted["environment"]
        rows = [row for row in rows if "environment" not in row]
        bad = sum(row["status"].startswith(("failed", "refused", "killed")) for row in rows)
        if status == "ok" and bad:
            status = f"failed: {bad} of {len(rows)} rows"
        whole = {"part": part.name, "variant": WHOLE, "status": status, "seconds": round(time.monotonic() - start, 1)}
        self.found[part.name] = [*rows, whole | {"budget_s": budget}]
        self.write()

    @property
    def rows(self) -> list[dict]:
        return [row for rows in self.found.values() for row in rows]

    def rates(self) -> dict[str, float]:
        return {row["rate_name"]: row["rate"] for row in self.rows if "rate_name" in row}

    def write(self) -> None:
        """All rows so far, with where they come from and what the tests said."""
        said = next((row["status"] for row in self.rows if row["variant"] == "gpu tests"), "not run")
        rates = {f"{name}_rate": float(f"{rate:.4g}") for name, rate in self.rates().items()}
        last = {"tests": said} | self.environment | self.commit | rates
        with self.lock, contextlib.redirect_stdout(io.StringIO()):
            bench_util.write_csv(self.csv, [row | last for row in self.rows])


def end_group(process: subprocess.Popen) -> None:
    """Kill a part and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        pass  # stuck in the driver: the next part is not to wait for it


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when every part was green."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder of the CSV and the log")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    parser.add_argument("--commit", help="of a checkout without git")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, without build, tests and sanitizer")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        part = Part(**given.child["part"])
        return run_part(part, given.child["device"], Path(given.child["rows"]), given.child["budget"], given.child["rates"])
    if not given.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry-run tries the suite on the CPU")
    suite, parts = Suite(given.out, given.dry_run, given.commit), [p for p in PARTS if not given.only or p.name in given.only]
    suite.say("budgets, in seconds: " + ", ".join(f"{part.name} {part.budget:g}" for part in parts)
              + f"; together {sum(part.budget for part in parts):g} of {LIMIT_S}")  # fmt: skip
    suite.run(parts)
    with contextlib.redirect_stdout(io.StringIO()) as table:
        bench_util.show([{k: str(v)[:60] for k, v in row.items()} for row in suite.rows], SUMMARY)
    suite.say(f"\n{table.getvalue()}\n{suite.csv}, {suite.log}")
    return int(any(row["status"] != "ok" and row["variant"] == WHOLE for row in suite.rows))


if __name__ == "__main__":
    sys.exit(main())
