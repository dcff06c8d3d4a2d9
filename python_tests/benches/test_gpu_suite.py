"""The GPU suite in its dry run: what it measures, and that no stage can stop the others."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.restricted_imports import FIVE, ROOT, only_allowed_imports

from bench import gpu_suite
from bench.common import results
from bench.common.arenas import Arena
from bench.common.steps import SparseStep
from bench.gpu_parts.runner import Run

TIMED = {
    "step LLaMA-2-7B",
    "step Llama-3-8B",
    "packed ops",
    "gradients",
    "selection",
    "bitmaps",
    "refresh",
    "factorizations",
    "training",
    "training 7B",
}
CHECKED = {"build", "tests", "sanitizer"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The whole command, with the standard library, five packages and what these need.

    Nothing else can be imported. A busy process keeps a core from it, because nothing in it may
    depend on the clock.
    """
    folder = tmp_path_factory.mktemp("dry")
    environment = only_allowed_imports(tmp_path_factory.mktemp("blocked"), FIVE)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "bench" / "gpu_suite.py", "--dry-run", "--out", folder, "--commit", "abc1234"],
            env=environment,
            capture_output=True,
            text=True,
        )
    finally:
        busy.kill()
        busy.wait()
    return done, folder


@pytest.mark.slow
@pytest.mark.native
def test_dry_run_is_green_with_five_packages(dry_run):
    done, folder = dry_run
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(file.name for file in folder.iterdir()) == [
        "gpu_check.csv",
        "gpu_check.log",
        "gpu_time.csv",
        "gpu_time.log",
    ]
    checked, rows = rows_of(folder / "gpu_check.csv"), rows_of(folder / "gpu_time.csv")
    assert {row["stage"] for row in checked} == CHECKED and {row["stage"] for row in rows} == TIMED | {"machine"}
    without = [row for row in rows if row["variant"].startswith(("LoRA", "SHiRA"))]
    assert [row["status"] for row in without] == 3 * ["missing: not installed (peft is missing): pip install peft"]
    for row in (*checked, *rows):
        assert row["status"] == "ok" or row["stage"] == "build" or row in without, row
        assert all(row[column] for column in ("device", "torch", "triton", "python", "lift_kernels", "cuda")), row
        assert row["commit"] == "abc1234" and row["tests"] == "ok"
    assert all(float(row["copy_rate"]) > 0 for row in rows)
    timed = [row for row in rows if row["stage"] in TIMED and row["variant"] != "(whole stage)" and row not in without]
    for row in timed:
        assert 0 < float(row["min_ms"]) <= float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["repeats"]) >= 1 and row["shape"] and row["dtype"] and row["op"]
        assert (
            row["correct"] == "yes"
            or "torch." in row["variant"]
            or "AdamW" in row["variant"]
            or "dense" in row["variant"]
        )
    variants = {(row["model"], row["variant"]) for row in timed if row["op"] == "sparse_adamw_"}
    for model in ("LLaMA-2-7B / 64", "Llama-3-8B / 64"):
        for form in ("fp32 moments and master", "bf16 moments, no master"):
            assert (model, f"dense bf16 gradients, {form}") in variants
        assert (model, "packed fp32 gradients, fp32 moments and master") in variants
        for name in ("AdamW fused, bf16", "AdamW fused, fp32", "packed fp32 gradients, fp32 moments"):
            assert (model, name) in variants
    assert all(
        float(row["ratio"]) > 0 for row in timed if row["op"] == "sparse_adamw_" and "gradients" in row["variant"]
    )
    calls_of_the_host = [row for row in timed if row["variant"] == "a moment of all matrices, 95 % stay"]
    assert [row["share_of_floor"] for row in calls_of_the_host] == [""]
    refreshed = [row for row in timed if row["stage"] == "refresh"]
    assert [row["variant"] for row in refreshed] == [
        "cold, one layer",
        "warm, one layer",
        "cold, all matrices",
        "warm, all matrices",
    ]
    assert all(0 < float(row["eigh_share"]) < 1 and 0 < float(row["orth_share"]) < 1 for row in refreshed)
    methods = {row["variant"] for row in timed if row["op"] == "backward"}
    assert {"plain nn.Linear, dense gradients", "LiftLinear, values.grad", "hook, p.lift_grad"} == methods


@pytest.mark.slow
@pytest.mark.native
def test_each_summary_is_printed_last_and_logged(dry_run):
    done, folder = dry_run
    printed = done.stdout
    for part in ("time", "check"):  # the last one printed first
        log = (folder / f"gpu_{part}.log").read_text()
        assert printed.endswith(log), f"{part} did not end with its table"
        printed = printed.removesuffix(log)
        table = log[log.rindex("stage ") :].splitlines()
        assert (
            len([line for line in table if line.strip()]) == len(rows_of(folder / f"gpu_{part}.csv")) + 2
        )  # head and files
        assert table[-1].endswith(f"gpu_{part}.log")
    assert "packed_gather: right" in done.stdout and "check, budgets in seconds: build 45" in done.stdout
    assert not printed


def test_budgets_fit_into_five_seven_and_three_minutes():
    sums = {part: sum(stage.budget for stage in stages) for part, stages in gpu_suite.STAGES.items()}
    assert gpu_suite.LIMITS_S == {"check": 300, "time": 395, "experiments": 180}
    assert all(sums[part] <= limit for part, limit in gpu_suite.LIMITS_S.items()), sums
    names = {part: {stage.name for stage in stages} for part, stages in gpu_suite.STAGES.items()}
    assert names == {"check": CHECKED, "time": TIMED | {"machine"}, "experiments": {"machine", "experiments"}}
    assert gpu_suite.NAMED_ONLY == {"experiments"}


STAGES = """
import subprocess, time
from pathlib import Path
def hangs(run):
    grandchild = subprocess.Popen(["sleep", "1000"])
    run.add("measured before", correct="yes", grandchild=grandchild.pid)
    Path({signal!r}).touch()
    time.sleep(1000)
def crashes(run):
    import os, signal
    os.kill(os.getpid(), signal.SIGSEGV)
def raises(run):
    raise RuntimeError("no kernel image is available")
def works(run):
    run.time("a call", lambda: sum(range(100)), op="sum", shape="100", dtype="int")
"""


@pytest.mark.slow
def test_a_stage_that_hangs_crashes_or_raises_stops_no_other(tmp_path, monkeypatch):
    """The one that hangs is out of time when it has measured something."""
    signal = tmp_path / "measured"
    (tmp_path / "some_stages.py").write_text(STAGES.format(signal=str(signal)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    stages = [gpu_suite.Stage(name, f"some_stages:{name}", 12) for name in ("hangs", "crashes", "raises", "works")]
    monkeypatch.setattr(gpu_suite, "STAGES", {"time": stages})
    really_ended = gpu_suite.ended

    def ended(process, deadline):
        hanging = "some_stages:hangs" in process.args[-1]
        while hanging and not signal.exists() and process.poll() is None:
            time.sleep(0.05)
        return really_ended(process, time.monotonic() if hanging else deadline)

    monkeypatch.setattr(gpu_suite, "ended", ended)
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    rows = rows_of(tmp_path / "out" / "gpu_time.csv")
    found = {(row["stage"], row["variant"]): row["status"] for row in rows}
    assert found == {
        ("hangs", "measured before"): "ok",
        ("hangs", "(whole stage)"): "killed after inf s",
        ("crashes", "(whole stage)"): "failed: exit status -11",
        ("raises", "the rest"): "failed: RuntimeError: no kernel image is available",
        ("raises", "(whole stage)"): "failed: exit status 1",
        ("works", "a call"): "ok",
        ("works", "(whole stage)"): "ok",
    }
    assert all(row["device"] for row in rows)
    state = Path(f"/proc/{next(row['grandchild'] for row in rows if row['grandchild'])}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_deadline_is_waited_for_and_no_longer():
    """Of a process that never ends, and of one that has ended."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        assert not gpu_suite.ended(process, time.monotonic() + 0.1)
        assert not gpu_suite.ended(process, time.monotonic() - 5)
    finally:
        process.kill()
        process.wait()
    assert gpu_suite.ended(process, time.monotonic() - 5) and gpu_suite.ended(process, math.inf)


def test_the_budget_counts_from_the_start_of_the_process(tmp_path, monkeypatch):
    """A stage is given its deadline, so the time of its imports counts."""
    given = []

    class Started(Exception):
        pass

    def started(command, **options):
        given.append(json.loads(command[-1]))
        raise Started

    timings = gpu_suite.Suite("time", tmp_path, dry=False, commit="abc")
    monkeypatch.setattr(gpu_suite.subprocess, "Popen", started)
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: 1000.0)
    with pytest.raises(Started):
        timings.run([gpu_suite.Stage("it", "some:where", 40)])
    assert given[0]["deadline"] == 1040.0
    (tmp_path / "rows").touch()
    run = Run("it", "cuda", tmp_path / "rows", given[0]["deadline"])
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: 1006.0)  # it took six seconds to import torch
    assert run.left() == 34.0


def test_the_timings_say_what_the_check_of_their_commit_said(tmp_path):
    timings = gpu_suite.Suite("time", tmp_path, dry=True, commit="abc")
    assert timings.tests() == "not run"
    row = {"stage": "tests", "variant": "gpu tests", "status": "failed", "commit": "abc"}
    results.write_csv(tmp_path / "gpu_check.csv", [row])
    assert timings.tests() == "failed"
    assert gpu_suite.Suite("time", tmp_path, dry=True, commit="def").tests() == "not run"


def test_bound_counts_bytes():
    # Entries 0, 1, 40 and 99 of a 10 x 10 matrix: in bf16 three lines of 64 bytes, in fp32 three as
    # well.
    arena = Arena.of([torch.tensor([0, 1, 40, 99], dtype=torch.int32)])
    weight, grad = torch.zeros(10, 10, dtype=torch.bfloat16), torch.zeros(10, 10, dtype=torch.bfloat16)
    assert SparseStep([weight], [grad], arena).roofline_bytes() == 3 * 64 * 3 + 4 * (4 + 16)
    assert SparseStep([weight], [grad], arena, packed=True).roofline_bytes() == 2 * 64 * 3 + 4 * (4 + 16 + 2)
    assert SparseStep([weight], [grad], arena, master=True).roofline_bytes() == 3 * 64 * 3 + 4 * (4 + 16 + 8)


def test_bound_counts_what_is_fetched():
    """Where an entry is read, 128 bytes are fetched: two such lines hold the four entries."""
    arena = Arena.of([torch.tensor([0, 1, 40, 99], dtype=torch.int32)])
    weight, grad = torch.zeros(10, 10, dtype=torch.bfloat16), torch.zeros(10, 10, dtype=torch.bfloat16)
    assert SparseStep([weight], [grad], arena).roofline_bytes(128) == 64 * 3 + 2 * 128 * 2 + 4 * (4 + 16)
    packed = SparseStep([weight], [grad], arena, packed=True, master=True)
    assert packed.roofline_bytes(128) == packed.roofline_bytes()
    dense = SparseStep([weight], [grad], arena, master=True)
    assert dense.roofline_bytes(128) == 2 * 64 * 3 + 128 * 2 + 4 * (4 + 16 + 8)


def test_the_floor_is_the_longer_of_bytes_and_flops(tmp_path):
    (tmp_path / "rows").touch()
    run = Run("it", "cpu", tmp_path / "rows", math.inf, 3, {"copy": 1e6, "bf16": 1e9})
    run.time("bytes", lambda: time.sleep(0.002), moved=1000, flops=1000)
    run.time("flops", lambda: time.sleep(0.002), moved=1, flops=1e6, against=("bytes", 0.01))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["floor_of"], row["floor_ms"]) for row in rows] == [("bytes", 1.0), ("flops", 1.0)]
    assert rows[1]["ratio"] == pytest.approx(10 / rows[1]["median_ms"], rel=1e-3) and rows[1]["baseline"] == "bytes"
