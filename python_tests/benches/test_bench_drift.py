"""`bench_drift`: the figures of a refresh, rows of paired runs, and a dry run."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bench import bench_drift
from lift_kernels.optim.refresh import MatrixRefresh, RefreshReport, SkippedRefresh


def mask(*positions):
    return torch.tensor(positions, dtype=torch.int32)


def test_a_row_compares_predicted_and_true_shares():
    old = {"a": mask(0, 1, 2, 3), "b": mask(0, 1), "c": mask(5, 6)}
    exact = {"a": mask(0, 1, 2, 9), "b": mask(0, 1), "c": mask(6, 7)}
    renewed = MatrixRefresh("c", "gram", 2, 0, True, 0.5, 0.1, predicted=0.2)
    report = RefreshReport((renewed,), (SkippedRefresh("a", 4, 0.8), SkippedRefresh("b", 2, 0.9)))
    row = bench_drift.drift_row(report, old, exact)
    assert (row["matrices"], row["skipped"]) == (3, 2)
    assert row["true"] == pytest.approx((0.25 * 4 + 0 + 0.5 * 2) / 8)
    assert row["predicted"] == pytest.approx((0.2 * 4 + 0.1 * 2 + 0.8 * 2) / 8)
    assert row["error_q50"] == pytest.approx(0.1) and row["worst"] == pytest.approx(-0.05)
    assert row["too_low"] == pytest.approx(1 / 3, abs=1e-4)
    assert row["lowest"] == 0.75 and row["mean_kept"] == pytest.approx(0.875)


REPORT = {
    "refreshes.matrices": 420,
    "refreshes.skipped": 0,
    "refreshes.skipped_overlap": None,
    "heldout_loss.before": 0.5,
    "heldout_loss.after": 0.1,
    "neutral_loss.after": 3.0,
    "exact_match.after": 0.6,
    "exact_match.after_low": 0.5,
    "exact_match.after_high": 0.7,
    "optimizer_state_bytes.measured": 7,
    "seconds.train": 9.0,
    "seconds.step": 0.1,
    "seconds.refreshes": 1.0,
    "settings.steps": 60,
}


def test_runs_of_a_seed_are_paired(tmp_path):
    given = []

    def run(method, folder, options):
        given.append((method, options))
        skips = options[3] != "0.0"
        if options[1] == "1" and skips:
            raise RuntimeError("no memory")
        more = {"refreshes.skipped": 400, "refreshes.matrices": 20, "heldout_loss.after": 0.105} if skips else {}
        (folder / "report.json").write_text(json.dumps(REPORT | more))
        return folder

    options = bench_drift.argparse.Namespace(seeds=[0, 1], bound=0.03, eval_problems=5)
    table = bench_drift.jobs(options, run)
    assert given[1] == ("lift", ["--seed", "0", "--refresh-drift", "0.03", "--eval-problems", "5"])
    assert [(row["variant"], row["seed"], row["status"]) for row in table] == [
        ("always", 0, "ok"),
        ("skipping", 0, "ok"),
        ("always", 1, "ok"),
        ("skipping", 1, "refused: no memory"),
    ]
    assert table[1]["loss_change"] == pytest.approx(0.005) and table[1]["refreshed"] == 20
    assert table[0]["loss_change"] == 0


@pytest.mark.slow
def test_a_dry_run_keeps_rows_of_other_parts(tmp_path):
    (tmp_path / "drift.csv").write_text("op,variant,lr\njob,always,\noverlap,old,1\n")
    assert bench_drift.main(["--dry-run", "--out", str(tmp_path)]) == 0
    with (tmp_path / "drift.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["op"], row["step"]) for row in rows] == [("job", ""), ("overlap", "3"), ("overlap", "6")]
    assert rows[0]["variant"] == "always"
    for row in rows[1:]:
        assert int(row["matrices"]) == 14 and 0 <= float(row["true"]) <= 1 and float(row["predicted"]) > 0
