"""bench/gpu_suite.py in its dry run: what it measures, that it refuses wrong kernels, that no stage
can stop the others.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.restricted_imports import BENCH, FIVE, ROOT, TARGET, blocked_by, only_allowed_imports

from lift_kernels import ops

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
}
CHECKED = {"build", "tests", "sanitizer"}


@pytest.fixture
def suite(monkeypatch):
    """The module gpu_suite; its parts can be imported too."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)
    import gpu_suite

    yield gpu_suite
    for name in set(sys.modules) - before:
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def in_process(suite, tmp_path: Path, target: str) -> list[dict]:
    """The rows of one stage, run here on tiny shapes."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    threads = torch.get_num_threads()
    try:
        suite.run_stage(suite.Stage("it", target, 60), "cpu", file, math.inf, {"copy": 1e9, "bf16": 1e9, "tf32": 1e9})
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The whole command, where nothing but the standard library and the five packages (and their
    needs) can be imported.

    A busy process keeps a core from it, for nothing in it may depend on the clock.
    """
    folder = tmp_path_factory.mktemp("dry")
    environment = only_allowed_imports(tmp_path_factory.mktemp("blocked"), FIVE)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        done = subprocess.run(
            [sys.executable, BENCH / "gpu_suite.py", "--dry-run", "--out", folder, "--commit", "abc1234"],
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
    for row in (*checked, *rows):
        assert row["status"] == "ok" or row["stage"] == "build", row
        assert all(row[column] for column in ("device", "torch", "triton", "python", "lift_kernels", "cuda")), row
        assert row["commit"] == "abc1234" and row["tests"] == "ok"
    assert all(float(row["copy_rate"]) > 0 for row in rows)
    timed = [row for row in rows if row["stage"] in TIMED and row["variant"] != "(whole stage)"]
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
    refreshed = [row for row in timed if row["stage"] == "refresh"]
    assert [row["variant"] for row in refreshed] == [
        "cold, one layer",
        "warm, one layer",
        "cold, all matrices",
        "warm, all matrices",
    ]
    assert all(0 < float(row["eigh_share"]) < 1 and 0 < float(row["orth_share"]) < 1 for row in refreshed)
    ways = {row["variant"] for row in timed if row["op"] == "backward"}
    assert {"plain nn.Linear, dense gradients", "LiftLinear, values.grad", "hook, p.lift_grad"} == ways


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


def test_budgets_fit_into_four_and_six_minutes(suite):
    sums = {part: sum(stage.budget for stage in stages) for part, stages in suite.STAGES.items()}
    assert suite.LIMITS_S == {"check": 240, "time": 360}
    assert all(sums[part] <= limit for part, limit in suite.LIMITS_S.items()), sums
    names = {part: {stage.name for stage in stages} for part, stages in suite.STAGES.items()}
    assert names == {"check": CHECKED, "time": TIMED | {"machine"}}


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
def test_a_stage_that_hangs_crashes_or_raises_stops_no_other(suite, tmp_path, monkeypatch):
    """The one that hangs is out of time when it has measured something, however long this takes
    here.
    """
    signal = tmp_path / "measured"
    (tmp_path / "some_stages.py").write_text(STAGES.format(signal=str(signal)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    stages = [suite.Stage(name, f"some_stages:{name}", 12) for name in ("hangs", "crashes", "raises", "works")]
    monkeypatch.setattr(suite, "STAGES", {"time": stages})
    really_ended = suite.ended

    def ended(process, deadline):
        hanging = "some_stages:hangs" in process.args[-1]
        while hanging and not signal.exists() and process.poll() is None:
            time.sleep(0.05)
        return really_ended(process, time.monotonic() if hanging else deadline)

    monkeypatch.setattr(suite, "ended", ended)
    assert suite.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
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


def test_a_deadline_is_waited_for_and_no_longer(suite):
    """Of a process that never ends, and of one that has ended."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        assert not suite.ended(process, time.monotonic() + 0.1)
        assert not suite.ended(process, time.monotonic() - 5)
    finally:
        process.kill()
        process.wait()
    assert suite.ended(process, time.monotonic() - 5) and suite.ended(process, math.inf)


def test_the_budget_counts_from_the_start_of_the_process(suite, tmp_path, monkeypatch):
    """A stage is given its deadline: what it imports is part of its time, and of what it believes
    to have left.
    """
    given = []

    class Started(Exception):
        pass

    def started(command, **options):
        given.append(json.loads(command[-1]))
        raise Started

    timings = suite.Suite("time", tmp_path, dry=False, commit="abc")
    monkeypatch.setattr(suite.subprocess, "Popen", started)
    monkeypatch.setattr(suite.time, "monotonic", lambda: 1000.0)
    with pytest.raises(Started):
        timings.run([suite.Stage("it", "some:where", 40)])
    assert given[0]["deadline"] == 1040.0
    (tmp_path / "rows").touch()
    run = importlib.import_module("gpu_parts.report").Run("it", "cuda", tmp_path / "rows", given[0]["deadline"])
    monkeypatch.setattr(suite.time, "monotonic", lambda: 1006.0)  # it took six seconds to import torch
    assert run.left() == 34.0


def test_the_timings_say_what_the_check_of_their_commit_said(suite, tmp_path):
    timings = suite.Suite("time", tmp_path, dry=True, commit="abc")
    assert timings.tests() == "not run"
    row = {"stage": "tests", "variant": "gpu tests", "status": "failed", "commit": "abc"}
    suite.bench_util.write_csv(tmp_path / "gpu_check.csv", [row])
    assert timings.tests() == "failed"
    assert suite.Suite("time", tmp_path, dry=True, commit="def").tests() == "not run"


@pytest.mark.native
def test_a_wrong_step_is_not_timed(suite, tmp_path, monkeypatch):
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        if options["backend"] != "reference":
            weights[-1].view(-1)[7] += 0.1  # one entry of one matrix

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    rows = in_process(suite, tmp_path, "gpu_parts.step:llama2")
    baselines = [row for row in rows if row["variant"].startswith("AdamW fused")]
    refused = [row for row in rows if row not in baselines]
    assert len(baselines) == 2 and all(row["median_ms"] > 0 for row in baselines)
    assert len(refused) == 8
    for row in refused:
        assert (
            row["correct"] == "no"
            and "median_ms" not in row
            and row["status"].startswith("refused, it is wrong: result ")
        )


WRONG = {
    "packed_gather": ("gpu_parts.packed:one_matrix", lambda out: out.mul_(1.01)),
    "packed_migrate": ("gpu_parts.packed:work", lambda out: out.roll(1)),
    "packed_l2_norm": ("gpu_parts.packed:norms", lambda out: out * 1.001),
    "packed_weight_grad": ("gpu_parts.grads:work", lambda out: out + 1.0),
    "lowrank_topk": ("gpu_parts.masks:selection", lambda out: (out[0].roll(1), out[1])),
}


@pytest.mark.native
@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_op_is_not_timed(suite, tmp_path, monkeypatch, op):
    target, spoil = WRONG[op]
    right = getattr(ops, op)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return out if options.get("backend") == "reference" else spoil(out)

    monkeypatch.setattr(ops, op, wrong)
    rows = in_process(suite, tmp_path, target)
    refused = [row for row in rows if row["status"].startswith("refused")]
    assert refused and {row["op"] for row in refused} <= {op, "backward"}
    assert all(row["correct"] == "no" and "median_ms" not in row for row in refused)
    assert not [
        row for row in rows if row.get("op") == op and row.get("correct") == "yes" and "reference" not in row["variant"]
    ]


@pytest.mark.native
def test_a_threshold_that_is_not_the_kth_is_refused(suite, tmp_path, monkeypatch):
    right = ops.lowrank_topk
    monkeypatch.setattr(ops, "lowrank_topk", lambda *a, **o: (lambda found: (found[0], found[1] * 0))(right(*a, **o)))
    rows = [row for row in in_process(suite, tmp_path, "gpu_parts.masks:selection") if "bracket" in row["variant"]]
    assert len(rows) == 4 and all("the threshold is 0" in row["status"] for row in rows)


@pytest.mark.native
def test_a_wrong_mask_is_not_timed(suite, tmp_path, monkeypatch):
    right = ops.lowrank_topk

    def wrong(left, right_, k, backend=None, **options):
        _, threshold = found = right(left, right_, k, backend=backend, **options)
        return found if backend == "reference" else (torch.arange(k, dtype=torch.int32).expand_as(found[0]), threshold)

    monkeypatch.setattr(ops, "lowrank_topk", wrong)
    rows = in_process(suite, tmp_path, "gpu_parts.masks:refresh")
    assert len(rows) == 4 and all(row["status"].startswith("refused, it is wrong: only 0.") for row in rows)


def test_a_block_that_is_not_orthonormal_is_refused(suite, tmp_path, monkeypatch):
    from lift_kernels import ops

    right = ops.cholesky_qr_

    def wrong(block, *arguments, **options):
        status = right(block, *arguments, **options)
        block[0, 0, 0] += 0.01
        return status

    monkeypatch.setattr(ops, "cholesky_qr_", wrong)
    rows = {row["variant"]: row["status"] for row in in_process(suite, tmp_path, "gpu_parts.factors:helpers")}
    assert rows.pop("cholesky_qr_, reference").startswith("refused, it is wrong: off by 0.0")
    assert set(rows.values()) == {"ok"}


@pytest.mark.native
def test_training_that_writes_outside_the_masks_is_refused(suite, tmp_path, monkeypatch):
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        for weight in weights:
            weight.add_(0.1)

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    rows = in_process(suite, tmp_path, "gpu_parts.train:work")
    assert [row["status"].split(":")[0] for row in rows] == ["ok", "refused, it is wrong", "refused, it is wrong"]


def test_the_sanitizers_driver_finds_a_wrong_op(suite, monkeypatch, capsys):
    from gpu_parts import cuda_ops

    monkeypatch.setattr(cuda_ops, "backend", lambda device: None)
    assert cuda_ops.main("cpu") == 0
    right = ops.packed_migrate

    def wrong(values, *arguments, backend, **options):
        out = right(values, *arguments, backend=backend, **options)
        return out if backend == "reference" or values.dtype != torch.int32 else out + 1

    monkeypatch.setattr(ops, "packed_migrate", wrong)
    capsys.readouterr()
    assert cuda_ops.main("cpu") == 1
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "packed_scatter_: right",
        "packed_migrate: 0 to 1 entries of torch.int32: results differ from the reference",
    ]


def test_the_sanitizer_has_a_case_for_every_cuda_op(suite):
    from gpu_parts.cuda_ops import CASES

    from lift_kernels.ops.dispatch import ops_of

    assert set(ops_of("native-cuda")) <= {name for name, _ in CASES}


def test_bound_counts_bytes(suite):
    from bench_arena import Arena
    from bench_sparse_adamw import Sparse

    # Entries 0, 1, 40 and 99 of a 10 x 10 matrix: in bf16 three lines of 64 bytes, in fp32 three as
    # well.
    arena = Arena.of([torch.tensor([0, 1, 40, 99], dtype=torch.int32)])
    weight, grad = torch.zeros(10, 10, dtype=torch.bfloat16), torch.zeros(10, 10, dtype=torch.bfloat16)
    assert Sparse([weight], [grad], arena).floor_bytes() == 3 * 64 * 3 + 4 * (4 + 16)
    assert Sparse([weight], [grad], arena, packed=True).floor_bytes() == 2 * 64 * 3 + 4 * (4 + 16 + 2)
    assert Sparse([weight], [grad], arena, master=True).floor_bytes() == 3 * 64 * 3 + 4 * (4 + 16 + 8)


def test_the_floor_is_the_longer_of_bytes_and_flops(suite, tmp_path):
    from gpu_parts.report import Run

    (tmp_path / "rows").touch()
    run = Run("it", "cpu", tmp_path / "rows", math.inf, 3, {"copy": 1e6, "bf16": 1e9})
    run.time("bytes", lambda: time.sleep(0.002), moved=1000, flops=1000)
    run.time("flops", lambda: time.sleep(0.002), moved=1, flops=1e6, against=("bytes", 0.01))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["floor_of"], row["floor_ms"]) for row in rows] == [("bytes", 1.0), ("flops", 1.0)]
    assert rows[1]["ratio"] == pytest.approx(10 / rows[1]["median_ms"], rel=1e-3) and rows[1]["baseline"] == "bytes"


PACKAGES = {"five packages": FIVE, "target machine": TARGET}
COLLECT = [
    sys.executable,
    "-m",
    "pytest",
    "--collect-only",
    "-q",
    "-m",
    "gpu",
    "-p",
    "no:cacheprovider",
    "python_tests",
]
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture(scope="module")
def all_gpu_tests():
    """Those that are collected where everything is installed."""
    from helpers.extras import MISSING

    assert not any(MISSING.values()), f"everything should be installed here: {MISSING}"
    return listed(subprocess.run(COLLECT, cwd=ROOT, env=os.environ | NO_PLUGINS, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("packages", PACKAGES)
def test_gpu_tests_are_collected(all_gpu_tests, tmp_path, packages):
    """With five packages and with those of a card's machine: every gpu test whose file needs no
    other, and no error.

    A file that needs more is left out with a line that says so.
    """
    from helpers.extras import MISSING, extras_of_file

    environment = only_allowed_imports(tmp_path, PACKAGES[packages]) | NO_PLUGINS
    done = subprocess.run(COLLECT, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    blocked = blocked_by(PACKAGES[packages])
    left_out = {file for file in MISSING if extras_of_file(file) & blocked}
    expected = {test for test in all_gpu_tests if file_of(test) not in left_out}
    assert listed(done.stdout) == expected and len(expected) > 700
    for file in ("finetune/test_finetune_run.py", "project/test_readme.py", "integrations/test_trl.py"):
        assert file in left_out and f"{file} is left out: " in done.stdout, done.stdout[:3000]
    files = {file_of(test) for test in expected}
    ops = {f"ops/test_{name}.py" for name in ("sparse_adamw", "lowrank_topk", "packed_ops")}
    assert ops | {"optim/test_lift_adamw.py"} <= files
    assert ("optim/test_optimizer_training.py" in left_out) == (packages == "five packages")


def file_of(test: str) -> str:
    """The file of a test, within python_tests."""
    return test.split("::")[0].removeprefix("python_tests/")


def listed(output: str) -> set[str]:
    """The tests that pytest listed."""
    return {line for line in output.splitlines() if line.startswith("python_tests/") and "::" in line}
