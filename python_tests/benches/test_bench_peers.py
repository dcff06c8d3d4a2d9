"""`bench_peers` in small: rows, bytes, missing baselines, and the refusal of a wrong op."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import bench_peers
from bench.common.arenas import Arena, clustered_indices
from bench.common.baselines import tensors_within
from bench.common.steps import SparseStep
from lift_kernels._storage import storage_bytes

TRITON = "one indexed Triton launch a parameter"


def small() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weights = [torch.randn(96, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return weights, [clustered_indices(96, 64, 0.05, seed=i) for i in range(2)]


@pytest.mark.native
def test_rows_and_bytes():
    weights, lists = small()
    rows = {
        r["variant"]: r
        for r in bench_peers.compare("small", weights, lists, torch.bfloat16, 1, only=["AdamW foreach", TRITON])
    }
    assert set(bench_peers.BASELINES) < set(rows)
    assert rows["AdamW fused"]["ratio"] == 1.0 and rows["AdamW foreach"]["median_ms"] > 0
    # moments of the weight's dtype and a step counter of 4 bytes a parameter
    assert (
        rows["AdamW fused"]["state_bytes"] == round(4 + 4 / (96 * 64), 4) and rows["AdamW fused"]["computed_bytes"] == 4
    )
    packed_row = rows["sparse_adamw_, packed grads, fp32 moments and master"]
    entries, padded = 2 * 307, 2 * 320
    assert packed_row["computed_bytes"] == round(16 * entries / (2 * 96 * 64), 4)
    assert packed_row["state_bytes"] == round((16 * padded + 2 * 4) / (2 * 96 * 64), 4)
    assert packed_row["status"] == "ok" and 0 < packed_row["share_of_floor"]
    assert rows[TRITON]["status"].startswith("needs a GPU")
    assert (
        rows["bitsandbytes AdamW"]["status"] == "switched off by --only"
        and "median_ms" not in rows["bitsandbytes AdamW"]
    )


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setitem(
        bench_peers.BASELINES, "ghost", bench_peers.optimizer("ghost-optim", "ghost_optim_that_is_not_there", "AdamW")
    )
    weights, lists = small()
    candidate, said = bench_peers.baseline("ghost", weights, weights, Arena.of(lists))
    assert candidate is None
    assert said == {"status": "not installed (ghost_optim_that_is_not_there is missing): pip install ghost-optim"}


def test_a_peer_that_fails_is_named(monkeypatch):
    def build(weights, grads, arena):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setitem(bench_peers.BASELINES, "broken", build)
    weights, lists = small()
    candidate, said = bench_peers.baseline("broken", weights, weights, Arena.of(lists))
    assert candidate is None and said == {"status": "RuntimeError: no kernel for this device"}


@pytest.mark.native
def test_a_wrong_op_is_refused(monkeypatch, tmp_path):
    right = SparseStep.__call__

    def wrong(self, backend=None):
        right(self, backend)
        if backend is None:
            self.weights[0].view(-1)[int(self.arena.indices[0])] += 1.0

    monkeypatch.setattr(SparseStep, "__call__", wrong)
    status = bench_peers.main(["--sets", "96x64", "--dtypes", "fp32", "--runs", "1", "--only", "--out", str(tmp_path)])
    assert status == 1 and (tmp_path / "peers.png").stat().st_size > 0
    with (tmp_path / "peers.csv").open() as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    for packed in ("dense", "packed"):
        row = rows[f"sparse_adamw_, {packed} grads"]
        assert row["status"].startswith("refused, it is wrong: result 0 differs") and row["median_ms"] == ""
    assert rows["AdamW fused"]["status"] == "ok" and rows["AdamW fused"]["torch"] == torch.__version__


def test_bytes_count_a_shared_storage_once():
    base = torch.zeros(100)

    class Holder:
        def __init__(self):
            self.matrix = torch.zeros(10, dtype=torch.uint8)

    assert (
        storage_bytes(
            tensors_within({"a": base, "b": [base[:50], Holder()], "p": torch.nn.Parameter(torch.zeros(9)), "n": 3})
        )
        == 410
    )
