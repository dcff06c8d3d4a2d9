"""Directories of comparisons: one process at a time, data that moved, and where code comes from."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess

import pytest
from helpers.comparison_runs import arguments, make_options, results
from helpers.finetune_runs import make_runs_cheap

from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune import origin
from lift_kernels.finetune.comparison import session
from lift_kernels.finetune.comparison.options import ROWS, resumed
from lift_kernels.finetune.comparison.session import TABLE, VERDICT, compare


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


def write_questions(path, count=40):
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."}) for i in range(count)]
    path.write_text("\n".join(lines))
    return path


def test_a_second_process_is_refused_and_changes_nothing(tiny, tmp_path, capsys):
    (tmp_path / f".{ROWS}.other").write_text("what the first process writes at the moment")
    number = os.open(tmp_path, os.O_RDONLY)  # a lock of another open file is refused, as of another process
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        assert main(arguments(tiny, tmp_path)) == 2
    finally:
        os.close(number)
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"error: another process runs the comparison in {tmp_path}; wait for its end, or choose another --output"
    )
    assert [path.name for path in tmp_path.iterdir()] == [f".{ROWS}.other"]
    assert main(arguments(tiny, tmp_path, "--budget", "0.01s")) == 0
    assert not (tmp_path / f".{ROWS}.other").exists()


def test_a_comparison_goes_on_with_data_and_a_model_that_moved(tiny, tmp_path, monkeypatch):
    data = write_questions(tmp_path / "data.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "over_budget", lambda self, trial: len(self.rows) == 3)
        assert not compare(make_options(tiny, tmp_path / "here", data=[str(data)]))
    before = results(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    moved, model = data.rename(tmp_path / "moved.jsonl"), tmp_path / "model"
    model.symlink_to(tiny)
    given = {"data": [str(moved)], "model": str(model)}
    assert compare(resumed(str(tmp_path / "there"), None, given))
    rows = results(tmp_path / "there")
    assert rows[:3] == before and len(rows) == 8 and len({row.fingerprint for row in rows}) == 1
    assert resumed(str(tmp_path / "there"), None, {}).settings.data == (str(moved),)
    write_questions(moved, 41)
    with pytest.raises(UserError, match="the training data of the comparison in .* was another one"):
        compare(resumed(str(tmp_path / "there"), None, {}))


def test_the_next_method_is_the_reference_where_every_rate_of_the_first_diverged(tiny, tmp_path):
    methods = ["full", "lift@5e-3", "random@5e-3"]
    assert compare(make_options(tiny, tmp_path, methods=methods, rates=["full=1e35"], most_rates=2))
    words = (tmp_path / VERDICT).read_text()
    assert "Target loss: lift@5e-3 " in words and "full has no final run: every rate diverged." in words
    table = (tmp_path / TABLE).read_text()
    assert table.startswith(f"{tiny}, word problems. Losses are in nats per token")
    alone = tmp_path / "alone"
    assert compare(make_options(tiny, alone, methods=["full"], rates=["full=1e35"], most_rates=2))
    words = (alone / VERDICT).read_text()
    assert words.startswith("There is no final run of full, so nothing is compared.\n")
    assert "Validation losses of full: diverged at 1e+35, diverged at 3e+34." in words


def test_a_package_in_the_repository_of_something_else_has_a_version_and_no_commit(tmp_path, monkeypatch):
    run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "something else"]):
        subprocess.run([*run, *command], check=True)
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "origin.py"))
    assert origin.commit.__wrapped__().startswith("version ")


def test_data_with_fewer_samples_than_were_asked_for_say_so(tiny, tmp_path, capsys):
    few = write_questions(tmp_path / "few.jsonl", count=30)  # a fifth is held out: 6 of the 8 that are asked for
    assert main(arguments(tiny, tmp_path / "few", "--data", str(few), "--budget", "0.01s")) == 0
    assert "6 held out: 2 for validation and 4 for the test (3 and 5 were asked for)\n" in capsys.readouterr().out
    enough = write_questions(tmp_path / "enough.jsonl")
    assert main(arguments(tiny, tmp_path / "enough", "--data", str(enough), "--budget", "0.01s")) == 0
    assert "8 held out: 3 for validation and 5 for the test\n" in capsys.readouterr().out
