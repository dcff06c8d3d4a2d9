"""The GPU suite and the driver of the sanitizer refuse wrong ops, masks and training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench import gpu_suite
from bench.gpu_parts import sanitizer_cases, training
from lift_kernels import ops
from lift_kernels.ops.dispatch import ops_of


def in_process(tmp_path: Path, target: str) -> list[dict]:
    """The rows of a stage (module:function), run here on tiny shapes."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    threads = torch.get_num_threads()
    try:
        gpu_suite.run_stage(
            gpu_suite.Stage("it", f"bench.gpu_parts.{target}", 60),
            "cpu",
            file,
            math.inf,
            {"copy": 1e9, "bf16": 1e9, "tf32": 1e9},
        )
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.native
def test_a_wrong_step_is_not_timed(tmp_path, monkeypatch):
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        if options["backend"] != "reference":
            weights[-1].view(-1)[7] += 0.1  # one entry of one matrix

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    rows = in_process(tmp_path, "step:llama2")
    baselines = [row for row in rows if row["variant"].startswith("AdamW fused")]
    refused = [row for row in rows if row not in baselines]
    assert len(baselines) == 4 and all(row["median_ms"] > 0 for row in baselines)
    assert len(refused) == 10
    for row in refused:
        assert (
            row["correct"] == "no"
            and "median_ms" not in row
            and row["status"].startswith("refused, it is wrong: result ")
        )


WRONG = {
    "packed_gather": ("packed_ops:one_matrix", lambda out: out.mul_(1.01)),
    "packed_migrate": ("packed_ops:work", lambda out: out.roll(1)),
    "packed_l2_norm": ("packed_ops:norms", lambda out: out * 1.001),
    "packed_weight_grad": ("weight_grads:work", lambda out: out + 1.0),
    "lowrank_topk": ("masks:selection", lambda out: (out[0].roll(1), out[1])),
}


@pytest.mark.native
@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_op_is_not_timed(tmp_path, monkeypatch, op):
    target, spoil = WRONG[op]
    right = getattr(ops, op)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return out if options.get("backend") == "reference" else spoil(out)

    monkeypatch.setattr(ops, op, wrong)
    rows = in_process(tmp_path, target)
    refused = [row for row in rows if row["status"].startswith("refused")]
    assert refused and {row["op"] for row in refused} <= {op, "backward"}
    assert all(row["correct"] == "no" and "median_ms" not in row for row in refused)
    assert not [
        row for row in rows if row.get("op") == op and row.get("correct") == "yes" and "reference" not in row["variant"]
    ]


@pytest.mark.native
def test_a_threshold_that_is_not_the_kth_is_refused(tmp_path, monkeypatch):
    right = ops.lowrank_topk
    monkeypatch.setattr(ops, "lowrank_topk", lambda *a, **o: (lambda found: (found[0], found[1] * 0))(right(*a, **o)))
    rows = [row for row in in_process(tmp_path, "masks:selection") if "bracket" in row["variant"]]
    assert len(rows) == 4 and all("the threshold is 0" in row["status"] for row in rows)


@pytest.mark.native
def test_a_wrong_mask_is_not_timed(tmp_path, monkeypatch):
    right = ops.lowrank_topk

    def wrong(left, right_, k, backend=None, **options):
        _, threshold = found = right(left, right_, k, backend=backend, **options)
        return found if backend == "reference" else (torch.arange(k, dtype=torch.int32).expand_as(found[0]), threshold)

    monkeypatch.setattr(ops, "lowrank_topk", wrong)
    rows = in_process(tmp_path, "masks:refresh")
    assert len(rows) == 4 and all(row["status"].startswith("refused, it is wrong: only 0.") for row in rows)


def test_a_block_that_is_not_orthonormal_is_refused(tmp_path, monkeypatch):
    right = ops.cholesky_qr_

    def wrong(block, *arguments, **options):
        status = right(block, *arguments, **options)
        block[0, 0, 0] += 0.01
        return status

    monkeypatch.setattr(ops, "cholesky_qr_", wrong)
    rows = {row["variant"]: row["status"] for row in in_process(tmp_path, "factorizations:subspace_ops")}
    assert rows.pop("cholesky_qr_, reference").startswith("refused, it is wrong: off by 0.0")
    assert set(rows.values()) == {"ok"}


@pytest.mark.native
def test_training_that_writes_outside_the_masks_is_refused(tmp_path, monkeypatch):
    right = ops.sparse_adamw_

    def wrong(weights, *arguments, **options):
        right(weights, *arguments, **options)
        for weight in weights:
            weight.add_(0.1)

    monkeypatch.setattr(ops, "sparse_adamw_", wrong)
    rows = in_process(tmp_path, "training:work")
    assert [row["status"].split(":")[0] for row in rows] == 4 * ["ok"] + 2 * ["refused, it is wrong"]


@pytest.mark.native
def test_a_method_that_raises_stops_no_other(tmp_path, monkeypatch):
    def raises(model):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    for name in (training.methods.FULL, training.SHIRA, training.methods.PACKED):
        monkeypatch.setitem(training.METHODS, name, raises)
    rows = {row["variant"]: row["status"] for row in in_process(tmp_path, "training:work")}
    assert rows.pop(training.methods.PACKED) == "refused: OutOfMemoryError: Tried to allocate 2 GiB"
    for name in (training.methods.FULL, training.SHIRA):
        assert rows.pop(name) == "missing: OutOfMemoryError: Tried to allocate 2 GiB"
    assert len(rows) == 3 and set(rows.values()) == {"ok"}


def test_training_that_changes_frozen_weights_or_learns_nothing_is_refused(tmp_path, monkeypatch):
    def touches(model):
        optimizer = training.methods.adapter("LoraConfig", lora_dropout=0.0)(model)
        base = model.blocks[0].q.base_layer.weight
        optimizer.register_step_post_hook(lambda *arguments: base.data.add_(0.01))
        return optimizer

    def learns_nothing(model):
        return torch.optim.SGD(model.parameters(), lr=0.0)

    wrong = {training.LORA: touches, training.methods.LINEAR: learns_nothing}
    monkeypatch.setattr(training, "METHODS", wrong)
    rows = in_process(tmp_path, "training:work")
    assert [row["status"].removeprefix("refused, it is wrong: ").split(" from")[0] for row in rows] == [
        "blocks.0.q.base_layer.weight is frozen but changed",
        "the loss went",
    ]


def test_the_sanitizers_driver_finds_a_wrong_op(monkeypatch, capsys):
    monkeypatch.setattr(sanitizer_cases, "backend", lambda device: None)
    assert sanitizer_cases.main("cpu") == 0
    right = ops.packed_migrate

    def wrong(values, *arguments, backend, **options):
        out = right(values, *arguments, backend=backend, **options)
        return out if backend == "reference" or values.dtype != torch.int32 else out + 1

    monkeypatch.setattr(ops, "packed_migrate", wrong)
    capsys.readouterr()
    assert sanitizer_cases.main("cpu") == 1
    assert sanitizer_cases.main("cpu", "gaussian_sketch_") == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "packed_scatter_: right",
        "packed_migrate: 0 to 1 entries of torch.int32: results differ from the reference",
    ]


def test_the_sanitizer_has_a_case_for_every_cuda_op():
    assert set(ops_of("native-cuda")) <= {name for name, _ in sanitizer_cases.CASES}
