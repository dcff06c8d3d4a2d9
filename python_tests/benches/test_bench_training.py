"""`bench_training` in small: its rows and their counting, missing methods, and wrong ones."""

from __future__ import annotations

import csv
from pathlib import Path

import peft  # noqa: F401  the file is left out where it is not installed
import pytest
import torch
from helpers.tiny_llama import tiny_config

from bench import bench_training
from bench.common import training_methods as methods
from bench.common.arenas import Arena

LORA, SHIRA = "LoRA (peft), AdamW fused", "SHiRA (peft), AdamW fused"


def read(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "training.csv").open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def tiny() -> torch.nn.Module:
    return methods.random_model(methods.llama_config(*methods.TINY), torch.float32, "cpu")


@pytest.mark.native
def test_dry_run(tmp_path):
    assert bench_training.main(["--dry-run", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path)
    assert list(rows) == list(methods.METHODS)
    galore = rows.pop("GaLore, r = 64")  # not among what the tests install
    assert galore["status"] == "ok" or galore["status"].startswith("missing: not installed (galore_torch")
    for row in rows.values():
        assert row["status"] == "ok" and row["runs"] == "2" and row["torch"] == torch.__version__
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert float(row["tokens_s"]) == pytest.approx(1e3 * 32 / float(row["median_ms"]), rel=1e-3)
        assert 0 < float(row["forward_backward_ms"]) < float(row["q75_ms"]) and 0 < float(row["share_of_floor"]) < 1
        assert float(row["loss_last"]) < float(row["loss_first"])
        assert float(row["model_mib"]) == 0.1 and 0 <= float(row["steps_peak_mib"]) <= float(row["peak_over_model_mib"])
        lift = row["variant"].startswith("LIFT")
        assert (float(row["refresh_ms"]) > 0) == lift and row["refresh_interval"] == ("200" if lift else "")
    # 2 layers of 4 matrices of 32 x 32 and 3 of 64 x 32; 5 % of each, or adapters of rank 1
    assert rows[methods.MATRIX]["trained"] == rows[methods.PACKED]["trained"] == str(2 * (4 * 51 + 3 * 102))
    assert rows[LORA]["trained"] == rows[SHIRA]["trained"] == str(2 * (4 * 64 + 3 * 96))
    assert rows[methods.FULL]["trained"] == rows[methods.FULL]["parameters"] and rows[methods.FULL]["ratio"] == "1.0"
    assert rows[methods.LINEAR]["trained"] == str(2 * (4 * 32 * 32 + 3 * 64 * 32))
    assert rows[methods.LINEAR]["ratio_linear"] == "1.0" and float(rows[methods.PACKED]["ratio_linear"]) > 0
    assert all((tmp_path / f"training.{kind}").stat().st_size > 0 for kind in ("csv", "png"))


def test_counting():
    model = tiny()
    tokens = methods.random_tokens(64, (2, 16), "cpu")
    inside, head, count = 2 * (4 * 32 * 32 + 3 * 64 * 32), 64 * 32, 32
    attention = 6 * 16 * 32 * 2 * count
    assert methods.flops(methods.FULL, model, tokens) == 6 * count * (inside + head) + attention
    for name in (methods.MATRIX, methods.PACKED, SHIRA, methods.LINEAR):
        assert methods.flops(name, model, tokens) == 6 * count * inside + 4 * count * head + attention
    assert methods.flops(LORA, model, tokens) == 4 * count * (inside + head) + attention + 6 * count * 1088
    assert methods.flops("GaLore, r = 64", model, tokens) == 6 * count * (inside + head) + attention + 4 * 32 * inside
    assert methods.optimizer_bytes(methods.Trainer(methods.FULL, model, tokens), model) == 28 * (
        inside + 2 * head + 5 * 32
    )
    linear = methods.Trainer(methods.LINEAR, tiny(), tokens)
    assert methods.optimizer_bytes(linear, linear.model) == 28 * inside
    lift = methods.Trainer(methods.MATRIX, tiny(), tokens)
    lines = Arena.of(lift.lists).line_bytes(4)
    assert methods.optimizer_bytes(lift, model) == 3 * lines + 1020 * 20


def test_full_fine_tuning_of_the_linear_layers_leaves_the_rest():
    model, plain = tiny(), tiny()
    tokens = methods.random_tokens(64, (2, 16), "cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = methods.Trainer(methods.LINEAR, model, tokens)
    for _ in range(3):
        trainer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    weights = methods.matrices(model)
    assert changed == {name for name, p in model.named_parameters() if any(p is w for w in weights)}
    assert len(changed) == 14
    expected = methods.reference_losses(plain, tokens, 3, train=methods.full_linear)
    assert trainer.losses == pytest.approx(expected, rel=1e-5) and expected[2] < expected[0]
    assert methods.reference_losses(plain, tokens, 3) != pytest.approx(expected, rel=1e-5)


def test_reference_is_the_published_update():
    """At density 1 the entries of the matrices are trained as by torch's AdamW on the whole
    matrices.
    """
    tokens = methods.random_tokens(64, (2, 16), "cpu")
    model = tiny()
    lists = [torch.arange(w.numel(), dtype=torch.int32) for w in methods.matrices(model)]
    losses = methods.reference_losses(model, tokens, 3, lists)
    optimizer = torch.optim.AdamW(methods.matrices(model), methods.HIGH, **methods.HYPER, foreach=False)
    for expected in losses:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert losses[2] < losses[1] < losses[0]


def spoil(monkeypatch, name: str, factor: float) -> None:
    """Another learning rate than the method should have."""
    right = methods.METHODS[name]

    def wrong(model):
        optimizer = right(model)
        optimizer.param_groups[0]["lr"] *= factor
        return optimizer

    monkeypatch.setitem(methods.METHODS, name, wrong)


@pytest.mark.native
def test_wrong_methods_are_refused(monkeypatch, tmp_path):
    spoil(monkeypatch, methods.PACKED, 1.05)
    spoil(monkeypatch, LORA, 0.0)
    chosen = [methods.FULL, methods.MATRIX, methods.PACKED, LORA]
    assert bench_training.main(["--dry-run", "--no-memory", "--only", *chosen, "--out", str(tmp_path)]) == 1
    rows = read(tmp_path)
    assert rows[SHIRA]["status"] == "switched off by --only"
    assert rows[methods.PACKED]["status"].startswith("refused, it is wrong: the loss of step 2 is ")
    assert rows[LORA]["status"].startswith("refused, it is wrong: the loss does not fall")
    assert all(rows[name]["median_ms"] == rows[name]["tokens_s"] == "" for name in (methods.PACKED, LORA))
    assert all(
        rows[name]["status"] == "ok" and float(rows[name]["ratio"]) > 0 for name in (methods.FULL, methods.MATRIX)
    )


@pytest.mark.native
def test_without_its_baseline_nothing_has_a_ratio(monkeypatch):
    spoil(monkeypatch, methods.FULL, 1.05)
    table = bench_training.compare("tiny", tiny(), (2, 16), 1, [methods.FULL, methods.MATRIX], memory=False)
    rows = {row["variant"]: row for row in table}
    assert rows[methods.FULL]["status"].startswith("refused, it is wrong: the loss of step 2 is ")
    assert (
        rows[methods.MATRIX]["status"] == "ok"
        and rows[methods.MATRIX]["ratio"] == ""
        and rows[methods.MATRIX]["median_ms"] > 0
    )


@pytest.mark.native
def test_a_mode_that_leaves_the_other_is_refused():
    plain = {name: [3.0, 2.0, 1.0] for name in (methods.FULL, methods.MATRIX, methods.PACKED)}
    losses = {methods.MATRIX: [3.0, 2.0, 1.0, 0.5], methods.PACKED: [3.0, 2.0, 1.0, 0.9]}
    assert bench_training.problem(methods.PACKED, losses, plain, 0.01).endswith(
        "(the loss fell by 2.5) as in LIFT, matrix mode"
    )
    losses[methods.PACKED][3] = 0.52
    assert bench_training.problem(methods.PACKED, losses, plain, 0.01) == ""
    losses[methods.PACKED][0] = 3.1
    assert (
        bench_training.problem(methods.PACKED, losses, plain, 0.01) == "its first loss is 3.1, the plain model's is 3"
    )
    assert bench_training.problem("x", {"x": [3.0, float("nan"), 1.0]}, plain, 0.01).startswith(
        "the loss does not fall"
    )


def test_what_cannot_run_is_named(monkeypatch):

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no kernel for this device")

    monkeypatch.setitem(
        methods.METHODS, "ghost", lambda model: methods.attribute("ghost-optim", "ghost_that_is_not_there", "A")
    )
    monkeypatch.setitem(methods.METHODS, "broken", lambda model: Broken(model.parameters(), 1.0))
    rows = bench_training.compare("tiny", tiny(), (2, 16), 1, [methods.FULL, "ghost", "broken"], memory=False)
    status = {row["variant"]: row["status"] for row in rows}
    assert status["ghost"] == "missing: not installed (ghost_that_is_not_there is missing): pip install ghost-optim"
    assert status["broken"] == "missing: RuntimeError: no kernel for this device" and status[methods.FULL] == "ok"
    assert methods.failed(methods.PACKED, RuntimeError("no")) == "refused: RuntimeError: no"


@pytest.mark.native
def test_peaks_of_memory():
    """Gradients and two moments of every weight on the one hand, of 5 % of the entries on the
    other.
    """
    config = tiny_config(hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    found = methods.peaks([methods.FULL, LORA, "ghost"], config, torch.float32, (1, 8), "cpu")
    size = found[methods.FULL]["model_mib"]
    assert size == pytest.approx(
        4 * (2 * (512 * (2 * 512 + 2 * 128) + 3 * 2048 * 512) + 2 * 258 * 512) / 2**20, abs=0.1
    )
    assert 3 * size <= found[methods.FULL]["steps_peak_mib"] < 4 * size
    assert 0.1 * size < found[LORA]["peak_over_model_mib"] < 1.5 * size
    assert found["ghost"] == {"memory_status": "missing: KeyError: 'ghost'"}
