"""Steps in several passes, epochs and activation checkpointing, on several ranks too."""

import json
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint as checkpoint
from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings
from helpers.forked_ranks import run_forked
from helpers.interrupted_runs import interrupted
from helpers.tiny_llama import save_tiny
from safetensors.torch import load_file

from lift_kernels.checkpoint import load_checkpoint
from lift_kernels.cli import main
from lift_kernels.finetune import word_problems
from lift_kernels.finetune.run import run

STEPS_AN_EPOCH = 3


@pytest.fixture(autouse=True)
def cheap_runs(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A file for 9 sequences of 4 problems: two batches of 4 and one of 1."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    found = word_problems.generate(2 + 4 + 36, "train")
    path.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in found))
    return str(path)


FORMS = {
    "packed": {},
    "dense": {"gradients": "dense"},
    "gradient": {"method": "gradient"},
    "lora": {"method": "lora"},
    "shira": {"method": "shira"},
    "full": {"method": "full", "lr": 1e-3},
}


@pytest.fixture(scope="module")
def finished(tiny, problems, tmp_path_factory):
    """A function that trains two epochs, once for each set of options, and returns the folder."""
    folders: dict[str, Path] = {}

    def make(form: str, **changes) -> Path:
        key = f"{form}-{changes}"
        if key not in folders:
            output = tmp_path_factory.mktemp("run")
            run(make_settings(tiny, output, **options(problems, form, **changes)))
            folders[key] = output / "run"
        return folders[key]

    return make


def options(problems: str, form: str, **changes) -> dict:
    base = {"data": problems, "batch_size": 16, "epochs": 2, "steps": None, "save_steps": 1}
    return base | {"refresh_interval": 3, "refresh_drift": 0} | FORMS[form] | changes


def progress(folder: Path) -> dict:
    return load_checkpoint(folder / "checkpoint.safetensors")["progress"]


def assert_same_training(actual: Path, expected: Path, at_most: float = 1e-4) -> None:
    """Losses and weights are the same up to rounding."""
    assert progress(actual)["losses"] == pytest.approx(progress(expected)["losses"], rel=1e-5)
    a, e = (load_file(folder / "model" / "model.safetensors") for folder in (actual, expected))
    for name, value in e.items():
        torch.testing.assert_close(a[name], value, rtol=0, atol=at_most, msg=name)


OTHERS = [pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form not in ("packed", "dense")]


@pytest.mark.parametrize("passes", [2, 4])
@pytest.mark.parametrize("form", ["packed", "dense", *OTHERS])
def test_a_step_in_several_passes_is_the_step_of_the_whole_batch(finished, form, passes):
    """The last step of an epoch has one sequence, and so one pass in place of 2 or 4."""
    whole, parts = finished(form), finished(form, accumulation=passes)
    assert len(progress(parts)["losses"]) == 2 * STEPS_AN_EPOCH
    assert len(progress(parts)["forward_backward"]) == 2 * STEPS_AN_EPOCH
    assert_same_training(parts, whole)


def test_epochs_count_whole_passes_over_the_data(finished, tiny, problems, tmp_path):
    """Half an epoch of 3 steps takes 2."""
    half = run(make_settings(tiny, tmp_path, **options(problems, "packed", epochs=0.5)))
    assert half["settings.steps"] == 2 and half["settings.epochs"] == 0.5
    report = json.loads((finished("packed") / "report.json").read_text())
    assert report["settings.steps"] == 2 * STEPS_AN_EPOCH
    state = json.loads(load_checkpoint(finished("packed") / "checkpoint.safetensors")["trainer_state"])
    assert state["epoch"] == 2.0


@pytest.mark.parametrize("at", [1, 3, 4])
def test_resuming_changes_no_bit_of_accumulated_steps(finished, tiny, problems, tmp_path, monkeypatch, at):
    """Runs stop within an epoch, at its end, and after the first step of another."""
    interrupted(monkeypatch, make_settings(tiny, tmp_path, **options(problems, "packed", accumulation=4)), at)
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", finished("packed", accumulation=4))


@pytest.mark.parametrize("form", ["packed", "dense", *OTHERS])
def test_activations_that_are_computed_again_change_no_bit(finished, form):
    kept, again = finished(form), finished(form, checkpointing=True)
    assert progress(again)["losses"] == progress(kept)["losses"]
    a, e = (load_file(folder / "model" / "model.safetensors") for folder in (again, kept))
    assert all(torch.equal(a[name], value) for name, value in e.items())


def test_activations_are_computed_again(tiny, problems, tmp_path, monkeypatch):
    seen = []
    original = checkpoint._checkpoint_without_reentrant_generator
    monkeypatch.setattr(
        checkpoint, "_checkpoint_without_reentrant_generator", lambda *a, **k: seen.append(1) or original(*a, **k)
    )
    run(make_settings(tiny, tmp_path, **options(problems, "packed", checkpointing=True, epochs=0.1)))
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("form", ["packed", "dense", "gradient", "full"])
def test_several_ranks_share_the_passes_of_a_step(finished, tiny, problems, tmp_path, form):
    """With activations that are computed again, and a last pass of one sequence for two ranks."""
    given = options(problems, form, accumulation=2) | {"model": tiny, "name": "ranks", "output": tmp_path / "runs"}
    given |= {"eval_problems": 2, "rank": 4, "density": 0.2, "device": "cpu", "lr": given.get("lr", 5e-3)}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]
    (tmp_path / "said").mkdir()
    [ranks] = run_forked(
        tmp_path / "said", [{"ranks": 2, "arguments": [*arguments, "--parallel", "ddp", "--checkpointing"]}]
    )
    assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert_same_training(tmp_path / "runs" / "ranks", finished(form))
