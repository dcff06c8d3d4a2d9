"""Options of a run: autocast, trackers, and what the help says of all of them."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.finetune_runs import make_runs_cheap, mean_loss, refused
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations import integration_utils

from lift_kernels.checkpoint import load_checkpoint
from lift_kernels.cli import main
from lift_kernels.finetune import evaluation
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.data import prepare_data
from lift_kernels.finetune.prompts import collate
from lift_kernels.finetune.run import run
from lift_kernels.nn.weight_kinds import LINEAR, weights_of


@pytest.fixture(autouse=True)
def cheap_runs(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


def test_the_help_has_every_option_once(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = capsys.readouterr().out
    for field in fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        assert [line for line in said.splitlines() if line.split()[:1] == [option]], option
    assert said.startswith("usage: lift_kernels finetune [options]")
    for group in ("data:", "method:", "training:", "measuring:", "output:"):
        assert f"\n{group}\n" in said


def test_every_option_reaches_the_settings(monkeypatch, tmp_path):
    given = (
        "--data a b --split test --loss all --packing --truncate --metric exact --neutral c d --include x --exclude y"
    )
    given += " --epochs 1.5 --accumulation 2 --checkpointing --autocast --report-to none --method full --shots 0"
    seen = []
    monkeypatch.setattr("lift_kernels.finetune.run", lambda settings, resumed: seen.append(settings))
    assert main(["finetune", *given.split()]) == 0
    assert seen == [
        Settings(
            data=("a", "b"),
            split="test",
            loss="all",
            packing=True,
            truncate=True,
            metric="exact",
            neutral=("c", "d"),
            include="x",
            exclude="y",
            epochs=1.5,
            accumulation=2,
            checkpointing=True,
            autocast=True,
            method="full",
            shots=0,
        )
    ]
    assert main(["finetune", "--problems", "hard", "--extra", ""]) == 0
    assert seen[1] == Settings(problems="hard", extra="")


@pytest.mark.parametrize("gradients", ["packed", "dense"])
def test_autocast_runs_forward_passes_in_bfloat16_and_nothing_else(settings, tiny, tokenizer, gradients):
    """One batch holds all sequences, so the loss of the first step can be computed by hand."""
    options = settings(autocast=True, gradients=gradients, name=f"auto-{gradients}", steps=1, save_steps=1)
    report = run(options)
    model, data = AutoModelForCausalLM.from_pretrained(tiny), prepare_data(options, tokenizer)
    batch = collate(data.sequences, tokenizer.pad_token_id)
    assert len(data.sequences) == data.rows == 2
    with torch.autocast("cpu", torch.bfloat16):
        total, count = evaluation.answer_loss(model, batch)
        before = mean_loss(model, tokenizer, data.encoded, 32)
    plain = mean_loss(model, tokenizer, data.encoded, 32)
    assert report["heldout_loss.before"] == before != plain
    assert before == pytest.approx(plain, rel=0.01)
    folder = Path(report["settings.output"]) / options.name
    saved = load_checkpoint(folder / "checkpoint.safetensors")
    assert saved["progress"]["losses"] == [pytest.approx(total.item() / count, rel=1e-6)]
    (total / count).backward()
    gradient = [w.parameter.grad.flatten() for w in weights_of(model) if w.kind == LINEAR]
    states = list(saved["optimizer"]["state"].values())
    norm = math.sqrt(sum((g[s["indices"].long()] ** 2).sum().item() for g, s in zip(gradient, states)))
    for g, state in zip(gradient, states):
        assert state["exp_avg"].dtype == torch.float32
        expected = 0.1 * g[state["indices"].long()] * min(1.0, 1.0 / norm)
        torch.testing.assert_close(state["exp_avg"], expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder / "model").parameters()} == {torch.float32}


class Tracker(TrainerCallback):
    """A tracker that keeps what it is sent."""

    sent: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append({"step": state.global_step, "run": args.run_name} | logs)


def test_a_tracker_gets_the_loss_of_every_step(settings, monkeypatch):
    Tracker.sent.clear()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    options = settings(name="tracked", steps=3, save_steps=1, report_to="mine", accumulation=2)
    run(options)
    saved = load_checkpoint(Path(options.output) / "tracked" / "checkpoint.safetensors")
    steps = [entry for entry in Tracker.sent if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert [entry["run"] for entry in steps] == ["tracked"] * 3
    assert [entry["loss"] for entry in steps] == pytest.approx(saved["progress"]["losses"], rel=1e-3)


def test_nothing_is_sent_by_default(settings, monkeypatch):
    Tracker.sent.clear()
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", {"mine": Tracker})
    run(settings(name="silent", steps=1))
    assert Tracker.sent == []


def test_a_tracker_without_its_package_is_one_line_with_the_command_that_installs_it(capsys, monkeypatch):
    class Missing(TrainerCallback):
        def __init__(self):
            raise RuntimeError("CometCallback requires comet-ml to be installed.")

    for name in ("comet_ml", "mine"):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Missing)
        package = name.replace("_", "-")
        assert refused(capsys, "--report-to", name) == (
            f"error: report_to is {name}, and its package is missing; run `pip install {package}`, or leave out "
            "--report-to"
        )
