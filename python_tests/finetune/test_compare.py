"""Whole comparisons of a tiny model: controls, files, interruptions, budgets."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from helpers.comparison_runs import TWO, arguments, make_options, results
from helpers.finetune_runs import make_runs_cheap

from lift_kernels.cli import main
from lift_kernels.errors import UserError
from lift_kernels.finetune.comparison import material, session, summary, trial
from lift_kernels.finetune.comparison.options import QUICK, ROWS, SETTINGS, design_of, from_command, resumed
from lift_kernels.finetune.comparison.session import PICTURE, TABLE, VERDICT, compare


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
    make_runs_cheap(monkeypatch.setattr)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a comparison that nothing interrupted."""
    output = tmp_path_factory.mktemp("comparisons") / "whole"
    assert compare(make_options(tiny, output))
    return output


@pytest.mark.slow
def test_a_method_ties_with_itself_and_not_with_a_thirtieth_of_its_rate(tiny, tmp_path):
    methods = ("lift@3e-3", "lift@3e-3", "lift@1e-4")
    compare(make_options(tiny, tmp_path, methods=methods, seeds=3, steps=12, test=12))
    found = summary.summarize(results(tmp_path), "lift@3e-3")
    same, lower = (found.method(name).target_difference for name in ("lift@3e-3 (2)", "lift@1e-4"))
    assert same.outcome == summary.TIE and abs(same.estimate.mean) < 0.1
    assert same.estimate.mean != 0  # its seeds are others
    assert lower.outcome == summary.LOSES and lower.estimate.mean > 0.2


def test_a_comparison_writes_rows_table_picture_and_verdict(whole):
    assert {path.name for path in whole.iterdir()} == {ROWS, TABLE, PICTURE, VERDICT, SETTINGS}
    rows = results(whole)
    assert [(r.stage, r.method, r.rate, r.seed, r.part) for r in rows] == [
        ("base", "base", 0.0, 0, "validation"),
        ("base", "base", 0.0, 0, "test"),
        ("pilot", "lift@5e-3", 5e-3, 0, "validation"),
        ("pilot", "full@1e-3", 1e-3, 0, "validation"),
        ("pilot", "lift@5e-3", 5e-3, 1, "validation"),
        ("pilot", "full@1e-3", 1e-3, 1, "validation"),
        ("final", "lift@5e-3", 5e-3, 0, "test"),
        ("final", "full@1e-3", 1e-3, 0, "test"),
    ]
    assert {len(r.target_losses) for r in rows if r.part == "test"} == {5}
    assert {len(r.target_losses) for r in rows if r.part == "validation"} == {3}
    assert len({r.fingerprint for r in rows}) == 1 and {r.status for r in rows} == {"ok"}
    assert 0 == rows[0].entries < rows[-2].entries < rows[-1].entries
    assert (whole / PICTURE).read_bytes().startswith(b"\x89PNG")
    table, words = (whole / TABLE).read_text(), (whole / VERDICT).read_text()
    assert table.count("\n") == 6 and "full@1e-3" in table
    assert "Not looked at: other rates than lift@5e-3 at 0.005, full@1e-3 at 0.001, other models and data" in words


def test_a_finished_comparison_runs_nothing_again(whole, tiny, capsys, monkeypatch):
    before = (whole / ROWS).read_bytes(), (whole / TABLE).read_text()
    monkeypatch.setattr(session, "run_trial", lambda *_: pytest.fail("a run that is finished ran again"))
    assert main(["compare", "--resume", str(whole)]) == 0
    assert "to run: none" in capsys.readouterr().out
    assert ((whole / ROWS).read_bytes(), (whole / TABLE).read_text()) == before


def test_the_test_part_is_measured_by_final_runs_alone(tiny, tmp_path, monkeypatch):
    seen, stage = [], []
    measure, run_trial = trial.measure, session.run_trial
    options = make_options(tiny, tmp_path, methods=["lift", "full@1e-3"], most_rates=2)
    hidden = material.load(options).test.encoded

    def record(model, tokenizer, data, *rest):
        if any(example in hidden for example in data.encoded):
            seen.append(stage[-1])
        return measure(model, tokenizer, data, *rest)

    monkeypatch.setattr(trial, "measure", record)
    monkeypatch.setattr(session, "run_trial", lambda s, t: (stage.append(t.stage), run_trial(s, t))[1])
    compare(options)
    assert stage == ["base", *["pilot"] * 4, "rates", "final", "final"]
    assert seen == ["base", "final", "final"]


@pytest.mark.parametrize("after", [1, 4, 7])
def test_an_interrupted_comparison_ends_with_the_same_rows(whole, tiny, tmp_path, monkeypatch, after):
    """It is interrupted in a run, and the last line of its rows is half a line."""
    count, run_trial = itertools.count(1), session.run_trial

    def interrupted(shared, chosen):
        found = run_trial(shared, chosen)
        if next(count) == after:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(session, "run_trial", interrupted)
        assert main(arguments(tiny, tmp_path)) == 130
    if (tmp_path / ROWS).exists():
        with open(tmp_path / ROWS, "a") as file:
            file.write("word problems,final,lift")
    place = tmp_path if after == 1 else tmp_path / ROWS
    assert main(["compare", "--resume", str(place)]) == 0
    assert results(tmp_path) == results(whole)


def test_results_do_not_depend_on_the_order_of_the_methods(whole, tiny, tmp_path):
    compare(make_options(tiny, tmp_path, methods=TWO[::-1]))
    finals = [{r.method: r for r in results(folder) if r.stage in ("base", "final")} for folder in (whole, tmp_path)]
    assert finals[0] == finals[1]


def test_a_budget_stops_the_comparison_and_it_goes_on_later(whole, tiny, tmp_path, capsys, monkeypatch):
    assert main(arguments(tiny, tmp_path, "--budget", "0.01s")) == 0
    output = capsys.readouterr().out
    assert "has no time for another run" in output and not (tmp_path / ROWS).exists()
    assert f"To go on: python -m lift_kernels compare --resume {tmp_path}" in output
    monkeypatch.setattr(session.Session, "over_budget", lambda self, t: len(self.rows) == 7)
    assert main(["compare", "--resume", str(tmp_path), "--budget", "1h"]) == 0
    words = (tmp_path / VERDICT).read_text()
    assert "Not complete: 1 run, about" in words and "full@1e-3" not in (tmp_path / TABLE).read_text()
    monkeypatch.undo()
    assert main(["compare", "--resume", str(tmp_path)]) == 0
    assert results(tmp_path) == results(whole)
    assert "Not complete" not in (tmp_path / VERDICT).read_text()


def test_a_budget_that_ends_before_the_finals_says_what_the_searches_found(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session.Session, "over_budget", lambda self, t: len(self.rows) == 9)
    assert main(arguments(tiny, tmp_path, "--methods", "lift", "full")) == 0
    words = (tmp_path / VERDICT).read_text()
    assert "There is no final run of lift yet" in words and not (tmp_path / TABLE).exists()
    for label, count in (("lift", 2), ("full", 1)):
        line = next(line for line in words.splitlines() if line.startswith(f"Validation losses of {label}: "))
        assert line.count(" at ") == count
    assert "Not complete: 5 to 13 runs, about" in words and words in capsys.readouterr().out


def test_more_seeds_and_methods_can_be_added_later(whole, tiny, tmp_path):
    compare(make_options(tiny, tmp_path, methods=TWO[:1]))
    compare(resumed(str(tmp_path), None, {"methods": list(TWO), "seeds": 2}))
    rows = results(tmp_path)
    assert {(r.method, r.seed) for r in rows if r.stage == "final"} == set(itertools.product(TWO, (0, 1)))
    assert set(results(whole)) <= set(rows)


def test_a_method_that_comes_into_the_pilot_later_is_not_run_again_at_a_rate_of_its_search(tiny, tmp_path, monkeypatch):
    methods = ["lift@1e-3", "full@1e-3", "random"]
    compare(make_options(tiny, tmp_path, methods=methods, most_rates=2))
    before, runs, run_trial = results(tmp_path), [], session.run_trial
    monkeypatch.setattr(session, "run_trial", lambda shared, chosen: runs.append(chosen) or run_trial(shared, chosen))
    monkeypatch.setattr(session.Session, "over_budget", lambda self, t: t.seed == 0)  # what is known costs nothing
    compare(resumed(str(tmp_path), None, {"methods": ["lift@1e-3", "random", "full@1e-3"]}))
    after = results(tmp_path)
    (tried,) = (row for row in before if (row.stage, row.method, row.rate) == ("rates", "random", 1e-3))
    assert [(run.stage, run.label, run.rate, run.seed) for run in runs] == [("pilot", "random", 1e-3, 1)]
    assert set(after) - set(before) == {dataclasses.replace(tried, stage="pilot"), after[-1]}
    assert after[: len(before)] == before and after[-1].stage == "pilot" and after[-1].seed == 1


def test_one_csv_holds_several_tasks(tiny, tmp_path, capsys):
    for task, steps in (("short", 2), ("long", 3)):
        compare(make_options(tiny, tmp_path, task=task, steps=steps))
    assert list(json.loads((tmp_path / SETTINGS).read_text())) == ["short", "long"]
    assert sorted({(r.task, r.fingerprint) for r in results(tmp_path)})[0][0] == "long"
    assert len({r.fingerprint for r in results(tmp_path)}) == 2
    assert main(["compare", "--resume", str(tmp_path)]) == 2
    assert "has the tasks short, long; choose one with --task" in capsys.readouterr().err
    assert resumed(str(tmp_path), "long", {}).settings.steps == 3


def test_a_rate_that_diverges_is_a_row(tiny, tmp_path, capsys):
    compare(make_options(tiny, tmp_path, methods=["lift@5e-3", "full@1e30", "lift@1e30"], refresh_interval=2))
    assert next(r for r in results(tmp_path) if r.method == "lift@1e30").status == "diverged"
    row = next(r for r in results(tmp_path) if r.method == "full@1e30")
    assert (row.status, row.target_losses, row.neutral_losses) == ("diverged", (), ())
    assert "full@1e30 diverged with 1 of 1 seed and is not compared." in (tmp_path / VERDICT).read_text()
    assert "final: full@1e30 at 1e+30, seed 0: diverged" in capsys.readouterr().out


def test_a_reference_that_diverges_is_said(tiny, tmp_path, capsys):
    compare(make_options(tiny, tmp_path, methods=["full@1e30", "lift@5e-3"]))
    words = (tmp_path / VERDICT).read_text()
    assert "full@1e30 diverged with 1 of 1 seed and is not compared." in words
    assert "the pilot diverged, so it does not say what the design can find" in capsys.readouterr().out
    compare(make_options(tiny, tmp_path / "alone", methods=["full@1e30"]))
    assert "there is nothing to draw" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("it does not fit"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_method_that_cannot_run_is_named_and_the_rest_goes_on(tiny, tmp_path, capsys, monkeypatch, error):
    prepare = trial.prepare

    def refuse(model, tokenizer, settings, *rest):
        if settings.method == "full":
            raise error
        return prepare(model, tokenizer, settings, *rest)

    monkeypatch.setattr(trial, "prepare", refuse)
    assert compare(make_options(tiny, tmp_path, methods=["lift@5e-3", "full@1e-3", "random@5e-3"]))
    reason = "it does not fit" if isinstance(error, ValueError) else "the memory does not suffice; lower --batch-size"
    assert f"full@1e-3 cannot run: {reason}" in (tmp_path / VERDICT).read_text()
    assert f"full@1e-3 cannot run: {reason}" in capsys.readouterr().out
    assert [r.method for r in results(tmp_path) if r.stage == "final"] == ["lift@5e-3", "random@5e-3"]


def test_a_metric_scores_final_runs_alone(tiny, tmp_path):
    compare(make_options(tiny, tmp_path, metric="number", methods=["lift@5e-3"]))
    scored = {(r.stage, r.part): r.correct and len(r.correct) for r in results(tmp_path)}
    assert scored == {
        ("base", "validation"): None,
        ("base", "test"): 5,
        ("pilot", "validation"): None,
        ("final", "test"): 5,
    }
    assert all(0 <= r.answered <= 5 for r in results(tmp_path) if r.part == "test")


def test_quick_means_one_rate_and_one_seed():
    chosen = from_command({"quick": True})
    design = design_of(chosen)
    assert [entry.label for entry in design.entries] == ["lift", "random", "full", "lora"]
    assert all(entry.fixed for entry in design.entries) and design.seeds == 1
    assert chosen.settings.steps == QUICK["steps"] and chosen.settings.metric == "none"
    assert from_command({"quick": True, "steps": 5}).settings.steps == 5


def test_other_data_than_that_of_the_finished_runs_are_refused(whole, tiny, tmp_path):
    data = tmp_path / "data.jsonl"

    def write(last: int):
        lines = [json.dumps({"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."}) for i in range(last)]
        data.write_text("\n".join(lines))

    write(60)
    options = make_options(tiny, tmp_path / "out", data=[str(data)])
    assert options.task == "data"
    compare(options)
    write(61)
    with pytest.raises(UserError, match="the training data of the comparison in .* was another one; restore the files"):
        compare(options)
