"""Options of comparisons that are refused, each by one line."""

from __future__ import annotations

import json

import pytest
from helpers.comparison_runs import arguments, make_options

from lift_kernels.cli import main
from lift_kernels.finetune.comparison import options
from lift_kernels.finetune.comparison.options import ROWS, SETTINGS, from_command, resumed, save, seconds_of


def refused(capsys, *given: str) -> str:
    assert main(list(given)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error.removeprefix("error: ")


@pytest.mark.parametrize(
    "given, message",
    [
        ("--methods lfit", "--methods lfit has the unknown method 'lfit'; use one of lift, "),
        ("--methods lift@0", "--methods lift@0 has the learning rate '0'; give a positive number, such as 3e-4"),
        ("--rates full=abc", "--rates full=abc has the learning rate 'abc'; give a positive number, such as 3e-4"),
        ("--budget abc", "--budget abc is no duration; give a number with a unit, such as 90s, 30m or 2h"),
        ("--budget 0m", "--budget 0m is no duration"),
        ("--budget 30", "--budget 30 is no duration"),
        ("--seeds 0", "seeds is 0; it must be at least 1"),
        ("--most-rates 0", "most_rates is 0; it must be at least 1"),
        ("--validation 1", "validation is 1; it must be at least 2"),
        ("--test 1", "test is 1; it must be at least 2"),
        ("--pieces 1", "pieces is 1; it must be at least 2"),
        ("--steps 0", "steps is 0; it must be at least 1"),
        ("--dtype int8", "unknown dtype 'int8'"),
        ("--resume nowhere", "--resume nowhere is neither the directory of a comparison nor its runs.csv"),
    ],
)
def test_a_bad_option_is_refused(capsys, given, message):
    assert refused(capsys, "compare", *given.split()).startswith(message)


def test_too_little_data_for_three_parts_is_refused(tiny, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."}) for i in range(15)]
    data.write_text("\n".join(lines))
    error = refused(capsys, *arguments(tiny, tmp_path / "out", "--data", str(data)))
    assert error == (
        "the data leave 3 held-out samples for validation and test, and each needs at least 2; give more --data"
    )
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_settings_names_the_first_difference(tiny, tmp_path, capsys):
    save(make_options(tiny, tmp_path), {})
    here = f"the comparison in {tmp_path} has"
    remedy = f"go on with --resume {tmp_path} and without --%s, or choose another --output"
    changed = ["--steps", "4", "--density", "0.3"]
    assert refused(capsys, *arguments(tiny, tmp_path, *changed)) == (
        f"--density is 0.3, and {here} 0.2; {remedy % 'density'}"
    )
    assert refused(capsys, "compare", "--resume", str(tmp_path), "--steps", "4") == (
        f"--steps is 4, and {here} 5; {remedy % 'steps'}"
    )
    assert refused(capsys, "compare", "--resume", str(tmp_path), "--methods", "full@1e-3").startswith(
        f"--methods is full@1e-3, and {here} lift@5e-3 full@1e-3"
    )
    assert refused(capsys, "compare", "--resume", str(tmp_path), "--output", "x").startswith("--resume goes on in")
    assert refused(capsys, "compare", "--resume", str(tmp_path), "--task", "x").startswith(
        f"{tmp_path} has no task 'x'"
    )


def test_saved_settings_are_read_as_they_were(tiny, tmp_path):
    chosen = make_options(tiny, tmp_path, data=["a.jsonl"], rates=["lift=1e-3"], task="t", budget="2h")
    save(chosen, {})
    again = resumed(str(tmp_path), None, {"budget": "2h"})
    assert again == chosen and again.budget == 7200.0
    assert resumed(str(tmp_path), "t", {}).budget is None
    assert resumed(str(tmp_path), None, {"seeds": 5, "methods": ["lift@5e-3", "lora"]}).seeds == 5


def test_passes_over_the_data_replace_steps_and_are_saved_as_such(tiny, tmp_path):
    chosen = make_options(tiny, tmp_path, steps=None, epochs=2.0)
    assert (chosen.settings.steps, chosen.settings.epochs) == (None, 2.0)
    save(chosen, {})
    assert resumed(str(tmp_path), None, {}) == chosen


def test_files_that_are_no_comparison_are_refused(tmp_path, capsys):
    assert refused(capsys, "compare", "--resume", str(tmp_path)).startswith(f"{tmp_path} has no {SETTINGS}")
    (tmp_path / SETTINGS).write_text("[]")
    assert "holds no settings of a comparison" in refused(capsys, "compare", "--resume", str(tmp_path))
    (tmp_path / SETTINGS).write_text("{")
    assert f"{tmp_path / SETTINGS} is no JSON" in refused(capsys, "compare", "--resume", str(tmp_path))
    (tmp_path / "other.csv").write_text("")
    assert f"nor its {ROWS}" in refused(capsys, "compare", "--resume", str(tmp_path / "other.csv"))


@pytest.mark.parametrize(("name", "value"), [("bogus", 1), ("seeds", "3")])
def test_saved_settings_that_were_edited_by_hand_are_refused_in_one_line(tiny, tmp_path, capsys, name, value):
    save(make_options(tiny, tmp_path), {})
    saved = json.loads((tmp_path / SETTINGS).read_text())
    saved["word problems"][name] = value
    (tmp_path / SETTINGS).write_text(json.dumps(saved))
    error = refused(capsys, "compare", "--resume", str(tmp_path))
    assert error.startswith(f"{tmp_path / SETTINGS} has options of task 'word problems' that are none (")


def test_a_first_look_is_refused_where_a_comparison_goes_on(tiny, tmp_path, capsys):
    save(make_options(tiny, tmp_path), {})
    assert refused(capsys, "compare", "--resume", str(tmp_path), "--quick") == (
        "--resume goes on with the options of its comparison; leave out --quick"
    )


def test_an_option_is_not_taken_for_another_one(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--seed", "3"])
    assert "unrecognized arguments: --seed 3" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "sub"])
def test_an_output_that_is_a_file_is_refused_in_plain_words(tiny, tmp_path, capsys, below):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / below
    assert refused(capsys, *arguments(tiny, place)) == (
        f"cannot read {place / SETTINGS}: Not a directory; restore it or choose another --output"
    )


def test_a_first_look_has_a_directory_of_its_own():
    assert from_command({"quick": True, "data": ["my.jsonl"]}).output == "runs/compare-my-quick"
    assert from_command({"quick": True, "output": "here"}).output == "here"


def test_durations_have_units():
    assert [seconds_of(text) for text in ("90s", "30m", "2h", "1.5h")] == [90, 1800, 7200, 5400]


def test_the_directory_is_named_after_the_task():
    assert from_command({}).output == "runs/compare-word-problems"
    assert from_command({"data": ["a/b c.jsonl", "d.csv"]}).output == "runs/compare-b-c-d"
    assert options.from_command({"problems": "hard"}).task == "hard word problems"
