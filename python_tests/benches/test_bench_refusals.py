"""Dry runs of the benches of the step, packed ops and packed weight gradients.

Each refuses to report a wrong op.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from bench import bench_host_time, bench_packed_ops, bench_packed_weight_grad, bench_sparse_adamw
from bench.common import results
from lift_kernels import ops

pytestmark = pytest.mark.native


def dry_run(module, folder: Path) -> tuple[int, list[dict[str, str]]]:
    """Exit status and rows; the files are where they should be."""
    status = module.main(["--dry-run", "--out", str(folder)])
    (file,) = folder.glob("*.csv")
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert all(row["device"] and row["torch"] and row["commit"] for row in rows)
    return status, rows


def assert_refused(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row["status"].startswith("refused, it is wrong: result ") and row.get("median_ms", "") == "", row


def assert_timed(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row["status"] == "ok" and float(row["median_ms"]) > 0, row


def test_sparse_adamw_dry_run(tmp_path):
    status, rows = dry_run(bench_sparse_adamw, tmp_path)
    assert status == 0 and (tmp_path / "sparse_adamw.png").stat().st_size > 0
    assert_timed(rows)
    variants = {(row["set"], row["variant"]) for row in rows}
    assert {
        ("dry, fp32", "AdamW fused"),
        ("dry, fp32", "packed grads"),
        ("dry, bf16", "dense grads, fp32 moments, fp32 master"),
        ("dry, fp32", "dense grads + refresh/100"),
        ("dry, bf16", "published LIFT step"),
    } <= variants
    assert all(float(row["ratio"]) == 1.0 for row in rows if row["variant"] == "AdamW fused")


def test_a_wrong_step_is_refused(tmp_path, monkeypatch):
    """From packed gradients alone, in bf16 alone: all else is timed."""
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        if options["backend"] != "reference" and options["packed_grads"] and weights[0].dtype == torch.bfloat16:
            weights[-1].view(-1)[7] += 0.1

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    status, rows = dry_run(bench_sparse_adamw, tmp_path)
    spoilt = [row for row in rows if row["set"] == "dry, bf16" and row["variant"].startswith("packed grads")]
    assert status == 1 and len(spoilt) == 7
    assert_refused(spoilt)
    assert_timed([row for row in rows if row not in spoilt])
    assert any(row["variant"].startswith("dense grads, bf16 moments + ") for row in rows)


def test_host_time_dry_run(tmp_path):
    status, rows = dry_run(bench_host_time, tmp_path)
    assert status == 0 and [row["variant"] for row in rows] == 2 * [bench_host_time.ADAMW, *bench_host_time.VARIANTS]
    assert_timed(rows)
    for row in rows:
        if row["variant"] != bench_host_time.ADAMW:
            assert 0 < float(row["op_ms"]) < float(row["median_ms"]) and float(row["rest_ms"]) > 0


def test_host_time_of_a_wrong_step_is_refused(tmp_path, monkeypatch):
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        if options["backend"] is None and options["packed_grads"] and weights[0].dtype == torch.float32:
            weights[-1].view(-1)[7] += 0.1

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    status, rows = dry_run(bench_host_time, tmp_path)
    spoilt = [row for row in rows if row["variant"].startswith("packed") and row["set"].endswith("float32")]
    assert status == 1 and len(spoilt) == 2
    assert_refused(spoilt)
    assert_timed([row for row in rows if row not in spoilt])


def test_packed_ops_dry_run(tmp_path):
    status, rows = dry_run(bench_packed_ops, tmp_path)
    assert status == 0 and (tmp_path / "packed_ops.png").stat().st_size > 0
    assert_timed(rows)
    for op in ("packed_gather", "packed_scatter_", "packed_l2_norm", "packed_migrate"):
        names = [row["variant"] for row in rows if row["op"] == op]
        assert names == [f"{op}, plain PyTorch", op] * 2
    names = [row["variant"] for row in rows if row["op"] == "arena_migrate_"]
    assert names == [f"arena_migrate_{way}" for way in (", plain PyTorch", ", packed_migrate for each arena", "")] * 2


@pytest.mark.parametrize(
    "op, spoil",
    [
        ("packed_gather", lambda out: out.mul_(1.01)),
        ("packed_scatter_", lambda out: out + 0.5),
        ("packed_l2_norm", lambda out: out * 1.001),
        ("packed_migrate", lambda out: out.roll(1)),
    ],
)
def test_a_wrong_packed_op_is_refused(tmp_path, monkeypatch, op, spoil):
    right = getattr(ops, op)

    def wrong(*arguments, backend="not said", **options):
        if backend == "not said":  # in the making of the cases
            return right(*arguments, **options)
        out = right(*arguments, backend=backend, **options)
        return out if backend == "reference" else spoil(out)

    monkeypatch.setattr(ops, op, wrong)
    status, rows = dry_run(bench_packed_ops, tmp_path)
    spoilt = [row for row in rows if row["op"] == op]
    assert status == 1 and len(spoilt) == 2
    assert_refused(spoilt)
    assert_timed([row for row in rows if row["op"] != op])


def test_packed_grad_dry_run(tmp_path):
    status, rows = dry_run(bench_packed_weight_grad, tmp_path)
    assert status == 0 and [row["part"] for row in rows] == ["memory"] * 3 + ["backward"] * 2 + ["step"] * 3
    dense, packed = rows[0], rows[1]
    assert float(dense["share_of_dense"]) == 1.0 and 0.05 <= float(packed["share_of_dense"]) < 0.06
    assert_timed(rows[3:])


def test_wrong_packed_gradients_are_refused(tmp_path, monkeypatch):
    right = ops.packed_weight_grad
    monkeypatch.setattr(ops, "packed_weight_grad", lambda *a, **o: right(*a, **o) * 1.01)
    status, rows = dry_run(bench_packed_weight_grad, tmp_path)
    assert status == 1 and [row["variant"] for row in rows] == ["packed gradients"]
    assert_refused(rows)


def test_a_dry_run_without_a_folder_writes_nothing(monkeypatch):
    monkeypatch.setattr(results, "write_csv", lambda *a: pytest.fail("a file was written"))
    assert bench_packed_ops.main(["--dry-run"]) == 0
