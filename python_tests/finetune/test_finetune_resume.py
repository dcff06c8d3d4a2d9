"""An interrupted fine-tuning run continues to the same bits, wherever it was interrupted.

Damaged files are refused.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.bits import HANG_S
from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings
from helpers.interrupted_runs import interrupted
from helpers.tiny_llama import save_tiny
from safetensors.torch import load_file, save_file

from lift_kernels.checkpoint import load_checkpoint
from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune import run_dir, trainer, word_problems
from lift_kernels.finetune.run import run
from lift_kernels.finetune.run_dir import settings_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


@pytest.fixture(autouse=True)
def cheap_runs(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


FORMS = {
    "lift": {},
    "bf16": {"dtype": "bfloat16"},
    "skipping": {"refresh_drift": 0.05},
    "random": {"method": "random"},
    "lora": {"method": "lora"},
    "full": {"method": "full", "lr": 1e-3},
}


CASES = [
    ("lift", 0),
    ("lift", 2),
    ("lift", 3),
    ("lift", 4),
    ("bf16", 3),
    ("skipping", 3),
    ("skipping", 5),
    ("random", 2),
    ("lora", 3),
    ("full", 5),
]


@pytest.mark.parametrize(("form", "at"), CASES)
def test_resuming_changes_no_bit(tiny, tmp_path, monkeypatch, undisturbed, form, at):
    """Runs stop before the first step, and just before, at and after a refresh.

    Every method is tested.
    """
    settings = make_settings(tiny, tmp_path, **FORMS[form])
    interrupted(monkeypatch, settings, at)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *["before.json"] * (at >= 0),
        *["checkpoint.safetensors"] * (at > 0),
        "settings.json",
    ]
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", undisturbed(form))


def test_the_skipping_run_skips_some_refreshes_and_not_others(undisturbed):
    report = json.loads((undisturbed("skipping") / "report.json").read_text())
    assert report["refreshes.skipped"] > 0 and report["refreshes.matrices"] > 0
    assert [row["step"] for row in report["refreshes.due"]] == [3, 6]
    saved = load_checkpoint(undisturbed("skipping") / run_dir.CHECKPOINT)["optimizer"]
    assert all({"drift_values", "drift_rate"} <= entry.keys() for entry in saved["state"].values())


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Folders of uninterrupted runs, by form."""
    folders: dict[str, Path] = {}

    def make(form: str, **changes) -> Path:
        if form not in folders:
            output = tmp_path_factory.mktemp(form)
            run(make_settings(tiny, output, **(FORMS.get(form, {}) | changes)))
            folders[form] = output / "run"
        return folders[form]

    return make


def write_problems(folder: Path) -> str:
    """A file of problems for four steps an epoch."""
    data = folder / "data.jsonl"
    problems = word_problems.generate(14, "train")
    data.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems))
    return str(data)


def test_resuming_in_a_later_epoch(tiny, tmp_path, monkeypatch, undisturbed):
    """The global random generator draws the order of each epoch.

    A checkpoint holds its state at the start of the epoch.
    """
    data = Path(write_problems(tmp_path))
    expected = undisturbed("epochs", data=str(data))  # four steps an epoch
    interrupted(monkeypatch, make_settings(tiny, tmp_path, data=str(data)), 6)
    run(settings_of(tmp_path / "run"), resumed=True)
    assert_same_end(tmp_path / "run", expected)
    data.write_text(data.read_text().replace("How", "Now"))
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(UserError, match="training data are not those"):
        run(settings_of(tmp_path / "run"), resumed=True)


def test_resuming_twice_in_an_epoch(tiny, tmp_path, monkeypatch, undisturbed):
    """The second run starts at the start of an epoch, the third in its middle.

    So the second must have saved the state from which it drew the order of the epoch.
    """
    settings = make_settings(tiny, tmp_path, data=write_problems(tmp_path))  # four steps an epoch
    expected = undisturbed("twice", data=write_problems(tmp_path))
    interrupted(monkeypatch, settings, 4)
    interrupted(monkeypatch, settings_of(tmp_path / "run"), 6, resumed=True)
    run(settings_of(tmp_path / "run"), resumed=True)
    assert_same_end(tmp_path / "run", expected)


@pytest.mark.parametrize(("every", "expected"), [(3, [3, 6, 8]), (4, [4, 8]), (20, [8])])
def test_checkpoints_come_at_their_interval_and_at_the_end(tiny, tmp_path, monkeypatch, every, expected):
    original, steps = trainer.save_checkpoint, []

    def save(path, state):
        steps.append(state["step"])
        original(path, state)

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    run(make_settings(tiny, tmp_path, save_steps=every))
    assert steps == expected
    assert load_checkpoint(tmp_path / "run" / run_dir.CHECKPOINT)["step"] == 8


@pytest.mark.slow
def test_sigkill_at_ten_random_points_changes_no_bit(tiny, tmp_path):
    command = [sys.executable, "-m", "helpers.killed_runs", str(tiny), str(tmp_path), "0"]
    path = os.pathsep.join(filter(None, sys.path))  # the process imports helpers too
    # One thread: on a busy machine, two threads wait for each other in every tiny operation.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 kills, 5 runs ended with the bits of the undisturbed one" in result.stdout


def test_a_run_leaves_no_checkpoint_when_it_is_finished(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()
    run(make_settings(tiny, tmp_path, steps=2))
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["answers.jsonl", "loss.png", "model", "report.json", "settings.json"]


def test_no_checkpoints_when_none_are_wanted(tiny, tmp_path, monkeypatch):
    interrupted(monkeypatch, make_settings(tiny, tmp_path, save_steps=0), 3)
    assert not (tmp_path / "run" / run_dir.CHECKPOINT).exists()


def refused(capsys, *arguments) -> str:
    assert main(["finetune", *map(str, arguments)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    return error[0]


def test_resume_refuses_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    interrupted(monkeypatch, make_settings(tiny, tmp_path), 2)
    capsys.readouterr()  # the progress bar ended within a line
    assert "leave out steps, lr" in refused(capsys, "--resume", folder, "--steps", 3, "--lr", 0.1)
    assert "no run to resume" in refused(capsys, "--resume", tmp_path)
    assert "no run to resume" in refused(capsys, "--resume", tmp_path / "none")
    path = folder / run_dir.CHECKPOINT
    whole = path.read_bytes()
    for damaged, reason in (
        (whole[:-9], "bytes and has"),
        (whole[:-1] + b"x", "does not match its checksum"),
        (b"PK" + whole, "claims a header of"),
        (b"", "has 0 bytes"),
    ):
        path.write_bytes(damaged)
        message = refused(capsys, "--resume", folder)
        assert str(path) in message and reason in message and "remove the file" in message
    path.write_bytes(whole)
    (folder / run_dir.SETTINGS).write_text('{"model": null}')
    assert "another version" in refused(capsys, "--resume", folder)
    (folder / run_dir.SETTINGS).write_text("{")
    assert "no run to resume" in refused(capsys, "--resume", folder)


def test_resume_refuses_another_base_and_a_finished_run(tiny, tmp_path, monkeypatch, capsys):
    model = save_tiny(tmp_path / "model", num_hidden_layers=1)
    interrupted(monkeypatch, make_settings(model, tmp_path), 2)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "the frozen weights are not those of the interrupted run" in refused(capsys, "--resume", tmp_path / "run")
    weights["model.embed_tokens.weight"][0, 0] -= 1
    save_tiny(model, num_hidden_layers=1)
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert "is finished" in refused(capsys, "--resume", tmp_path / "run")


@contextlib.contextmanager
def files_up_to(size: int):
    """A limit on file sizes stands in for a full disk: the kernel refuses to let a file grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_the_model_is_saved(tiny, tmp_path, capsys, monkeypatch, undisturbed):
    """No model appears, and the last checkpoint stays.

    The run ends once there is space.
    """
    settings = make_settings(tiny, tmp_path)
    original = run_dir.save_model

    def full(*arguments):
        with files_up_to(10000):
            original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "save_model", full)
        with pytest.raises(UserError, match="cannot write .*model: .* free some space, then run finetune --resume"):
            run(settings)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["before.json", "checkpoint.safetensors", "settings.json"]
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", undisturbed("lift"))


def test_a_full_disk_while_saving_is_one_line_and_the_run_can_go_on(tiny, tmp_path, capsys, undisturbed):
    """The disk is full at the third checkpoint, and the second stays.

    With space again the run ends with the bits of an uninterrupted one.
    """
    settings = make_settings(tiny, tmp_path)
    original, calls = trainer.save_checkpoint, []

    def full(path, state):
        calls.append(path)
        if len(calls) == 3:
            with files_up_to(10000):
                original(path, state)
        original(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", full)
        with pytest.raises(UserError, match="cannot write .* a file that was there is unchanged"):
            run(settings)
    assert load_checkpoint(tmp_path / "run" / run_dir.CHECKPOINT)["step"] == 2
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "run", undisturbed("lift"))
