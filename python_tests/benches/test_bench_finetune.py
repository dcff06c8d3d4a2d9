"""`bench_finetune`: rows from reports, and the refusal of runs."""

from __future__ import annotations

import json

import torch

from bench import bench_finetune

REPORT = {
    "exact_match.before": 0.2,
    "exact_match.after": 0.6,
    "heldout_loss.after": 0.1,
    "seconds.total": 200.0,
    "entries": 7,
}


def fake_run(reports):
    """Stands for the runs: writes the report of a method, or fails."""

    def run(method, folder, options):
        if reports[method] is None:
            raise RuntimeError("no memory")
        (folder / method).mkdir()
        (folder / method / "report.json").write_text(json.dumps(reports[method]))
        return folder / method

    return run


def test_rows_are_the_reports(tmp_path):
    reports = {"random": REPORT, "lora": REPORT | {"exact_match.after": 0.5}}
    first, second = bench_finetune.rows(["random", "lora"], tmp_path, [], fake_run(reports))
    assert (first["variant"], first["exact_after"], first["loss_after"], first["total_s"]) == (
        "random",
        0.6,
        0.1,
        200.0,
    )
    assert (second["exact_after"], second["entries"], second["neutral_after"], second["status"]) == (0.5, 7, "", "ok")


def test_a_run_that_failed_or_began_elsewhere_is_refused(tmp_path):
    reports = {"random": REPORT, "lora": REPORT | {"exact_match.before": 0.3}, "full": None}
    table = bench_finetune.rows(list(reports), tmp_path, [], fake_run(reports))
    assert [row["status"] for row in table] == [
        "ok",
        "refused: exact match before training is 0.3, of the first run 0.2",
        "refused: no memory",
    ]
    assert all("exact_after" not in row for row in table[1:])


def test_a_delta_that_gives_other_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_finetune, "command", lambda *arguments: 1.0)
    monkeypatch.setattr(
        "safetensors.torch.load_file", lambda path: {"w": torch.full((2,), float("tuned" in str(path)))}
    )
    table = bench_finetune.rows(["lift"], tmp_path, [], fake_run({"lift": REPORT}))
    assert table[0]["status"] == "refused: the delta does not give the trained weights"
