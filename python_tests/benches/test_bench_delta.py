"""Dry runs of `bench_delta` and `bench_memory`: their values, and refusals."""

from __future__ import annotations

import csv
from pathlib import Path

import peft  # noqa: F401  the file is left out where it is not installed
import pytest
import safetensors.torch  # noqa: F401  likewise
import torch
import transformers  # noqa: F401  likewise

from bench import bench_delta, bench_memory

MOVES = ("save_delta", "apply", "revert", "apply to a checkpoint")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_delta_dry_run(tmp_path):
    assert bench_delta.main(["--dry-run", "--runs", "2", "--out", str(tmp_path)]) == 0
    rows = {(row["set"][-4:], row["variant"]): row for row in read(tmp_path / "delta.csv")}
    assert len(rows) == 14 and (tmp_path / "delta.png").stat().st_size > 0
    for (dtype, variant), row in rows.items():
        width = {"fp32": 4, "bf16": 2}[dtype]
        assert (
            row["status"] == "ok"
            and row["runs"] == "2"
            and float(row["median_ms"]) > 0
            and row["parameters"] == "24736"
        )
        assert float(row["share_of_floor"]) == pytest.approx(float(row["floor_ms"]) / float(row["median_ms"]), rel=1e-3)
        assert row["baseline"] == (
            bench_delta.SAVE if variant in (bench_delta.SAVE, "save_delta") else bench_delta.LOAD
        )
        assert row["entries"] == "1020"  # 5 % of the entries of 14 matrices
        assert row["file_bytes"] == {bench_delta.SAVE: str(24736 * width)}.get(variant, row["file_bytes"])
        if variant == "save_delta":
            assert row["computed_bytes"] == str(4 + 2 * width)
            assert float(row["bytes_per_entry"]) == pytest.approx(int(row["file_bytes"]) / 1020, abs=1e-4)


def test_a_wrong_delta_is_refused(monkeypatch, tmp_path):
    right = bench_delta.apply_delta

    def wrong(model, path, output=None):
        right(model, path, output)
        if isinstance(model, torch.nn.Module):
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[3, 5] += 1

    monkeypatch.setattr(bench_delta, "apply_delta", wrong)
    assert bench_delta.main(["--dry-run", "--dtypes", "fp32", "--runs", "1", "--out", str(tmp_path)]) == 1
    rows = {row["variant"]: row for row in read(tmp_path / "delta.csv")}
    problem = "refused, it is wrong: model.layers.1.mlp.up_proj.weight differs"
    assert rows["apply"]["status"] == rows["save_delta"]["status"] == problem
    assert rows["revert"]["status"].startswith("refused, it is wrong: FileError: ")
    assert all(rows[move]["median_ms"] == "" for move in ("save_delta", "apply", "revert"))
    assert rows["apply to a checkpoint"]["status"] == "ok" and float(rows["apply to a checkpoint"]["median_ms"]) > 0


@pytest.fixture
def small(monkeypatch):
    """The memory bench with few baselines, and the shape of its dry run."""
    baselines = {
        name: bench_memory.BASELINES[name]
        for name in (bench_memory.ADAMW, "LoRA (peft), AdamW fused", "SHiRA (peft), AdamW fused")
    }
    baselines["ghost"] = bench_memory.on_matrices("ghost-optim", "ghost_that_is_not_there", "AdamW")
    monkeypatch.setattr(bench_memory, "BASELINES", baselines)
    return bench_memory


@pytest.mark.native
def test_memory_dry_run(small, tmp_path):
    assert small.main(["--dry-run", "--out", str(tmp_path)]) == 0
    table = read(tmp_path / "memory.csv")
    rows = {(row["set"], row["variant"]): row for row in table}
    assert len(table) == 2 * 4 + 3 * 2 and (tmp_path / "memory.png").stat().st_size > 0
    fp32, mixed, bf16 = small.FORMS
    parts = {key: [float(row[part] or 0) for part in small.PARTS] for key, row in rows.items() if row["status"] == "ok"}
    parameters = 4 * 128 * 128 + 3 * 128 * 320
    share = sum(round(0.05 * n) for n in (*[128 * 128] * 4, *[128 * 320] * 3)) / parameters
    rank = round(0.05 * parameters / (4 * 256 + 3 * 448)) * (4 * 256 + 3 * 448) / parameters
    lora, shira, matrix, packed = (
        "LoRA (peft), AdamW fused",
        "SHiRA (peft), AdamW fused",
        "LIFT, matrix mode",
        "LIFT, packed mode",
    )
    expected = {  # added, gradients, indices, master, moments
        (fp32, small.ADAMW): [0, 4, 0, 0, 8],
        (bf16, small.ADAMW): [0, 2, 0, 0, 4],
        (fp32, lora): [4 * rank, 4 * rank, 0, 0, 8 * rank],
        (fp32, shira): [12 * rank, 4 * rank, 0, 0, 8 * rank],
        (fp32, matrix): [0, 4, 4 * share, 0, 8 * share],
        (mixed, matrix): [0, 2, 4 * share, 4 * share, 8 * share],
        (bf16, matrix): [0, 2, 4 * share, 0, 4 * share],
        (fp32, packed): [0, 4 * share, 4 * share, 4 * share, 8 * share],
        (mixed, packed): [0, 4 * share, 4 * share, 4 * share, 8 * share],
    }
    for key, values in expected.items():
        assert parts[key][:5] == pytest.approx(values, rel=0.01, abs=2e-3), key  # padding, step counters
        assert float(rows[key]["total"]) == pytest.approx(sum(parts[key]), abs=1e-3)
        assert float(rows[key]["computed"]) == pytest.approx(float(rows[key]["total"]), rel=0.01)
    assert float(rows[fp32, packed]["share_of_adamw"]) == pytest.approx(
        float(rows[fp32, packed]["total"]) / 12, rel=1e-3
    )
    assert rows[bf16, packed]["status"] == "not offered: packed mode keeps its trained values in fp32"
    assert rows[fp32, "ghost"]["status"].startswith("missing: not installed (ghost_that_is_not_there is missing)")


@pytest.mark.native
def test_memory_that_is_not_accounted_for_is_refused(small, monkeypatch):
    methods = small.training_methods
    right = methods.METHODS[methods.MATRIX]

    def wrong(model, **options):
        optimizer = right(model, **options)
        for entry in optimizer.state.values():  # a slice that keeps its whole storage
            entry["threshold"] = torch.zeros(4096)[0]
        return optimizer

    monkeypatch.setitem(methods.METHODS, methods.MATRIX, wrong)
    monkeypatch.setattr(small, "BASELINES", {small.ADAMW: small.BASELINES[small.ADAMW]})
    rows = {(row["set"], row["variant"]): row for row in small.compare((128, 320, 1, 64))}
    row = rows["fp32", methods.MATRIX]
    assert (
        row["status"].startswith("refused, it is wrong: ")
        and row["status"].endswith(" computed")
        and "total" not in row
    )
    assert rows["fp32", methods.PACKED]["status"] == "ok"
