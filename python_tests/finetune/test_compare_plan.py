"""Which runs a comparison makes, and in which order. Nothing is trained here."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers.comparison_runs import make_row

from lift_kernels.errors import UserError
from lift_kernels.finetune.comparison import plan
from lift_kernels.finetune.comparison.costs import Costs

DEFAULTS = {"lift": 1e-3, "random": 1e-3, "full": 1e-4, "lora": 1e-3}


def design(*names: str, seeds: int = 2, most_rates: int = 7, first: tuple[str, ...] = ()) -> plan.Design:
    entries = plan.read_entries(names, DEFAULTS, first, most_rates > 1)
    return plan.Design(entries, seeds, most_rates)


def run_all(chosen: plan.Design, loss, failed=()) -> list[plan.Trial]:
    """Play a comparison to its end, with losses by a function of the trial."""
    rows, trials, bounds = [], [], []
    while (trial := plan.next_trial(chosen, rows, failed)) is not None:
        bounds.append([sum(plan.remaining(chosen, rows, failed, most).values()) for most in (False, True)])
        trials.append(trial)
        part = "test" if trial.stage == "final" else "validation"
        row = make_row(trial.stage, trial.label, trial.rate, trial.seed, loss(trial), part)
        rows.append(row)
        if trial.stage == "pilot" and trial.seed == 0 and not trial.entry.fixed:
            rows.append(make_row("rates", trial.label, trial.rate, 0, loss(trial)))
        assert len(trials) < 200
    diverged = all(row.status == "diverged" for row in rows if row.method == chosen.entries[-1].label)
    for done, (least, most) in enumerate(bounds):
        assert (diverged or least <= len(trials) - done) and len(trials) - done <= most
    assert not plan.remaining(chosen, rows, failed, True)
    return trials


def bowl(best: dict[str, float]):
    """A loss with its minimum at the best rate of each method."""
    return lambda trial: abs(math.log10(trial.rate / best[trial.entry.method])) if trial.entry else 9.0


def names(trials, stage) -> list[tuple[str, float, int]]:
    return [(t.label, t.rate, t.seed) for t in trials if t.stage == stage]


def test_searches_take_turns_and_so_do_the_methods_of_each_seed():
    trials = run_all(design("lift", "full"), bowl({"lift": 1e-3, "full": 1e-4}))
    stages = [trial.stage for trial in trials]
    assert stages == sorted(stages, key=("base", "pilot", "rates", "final").index)
    assert names(trials, "pilot") == [("lift", 1e-3, 0), ("full", 1e-4, 0), ("lift", 1e-3, 1), ("full", 1e-4, 1)]
    assert [label for label, _, _ in names(trials, "rates")] == ["lift", "full", "lift", "full"]
    assert names(trials, "final") == [("lift", 1e-3, 0), ("full", 1e-4, 0), ("lift", 1e-3, 1), ("full", 1e-4, 1)]


def test_a_search_goes_on_past_the_edge_until_the_best_rate_is_inside():
    trials = run_all(design("lift", "full"), bowl({"lift": 1e-3, "full": 3e-3}))
    assert [rate for label, rate, _ in names(trials, "rates") if label == "full"] == [3e-4, 1e-3, 3e-3, 1e-2]
    assert ("full", 3e-3, 1) in names(trials, "final")


def test_a_search_ends_at_its_limit():
    trials = run_all(design("lift", "full", most_rates=4), bowl({"lift": 1e-3, "full": 1.0}))
    assert [rate for label, rate, _ in names(trials, "rates") if label == "full"] == [3e-4, 1e-3, 3e-3]
    assert ("full", 3e-3, 0) in names(trials, "final")


def test_the_order_of_methods_changes_no_rate_and_no_final_run():
    best = {"lift": 3e-3, "full": 3e-5, "lora": 1e-3}
    one, other = (run_all(design(*order), bowl(best)) for order in (("lift", "full", "lora"), ("lora", "full", "lift")))
    assert set(names(one, "final")) == set(names(other, "final"))


def test_a_fixed_rate_is_not_searched():
    trials = run_all(design("lift@3e-4", "full", seeds=1), bowl({"lift": 1e-3, "full": 1e-4}))
    pilot = [("lift@3e-4", 3e-4, 0), ("full", 1e-4, 0), ("lift@3e-4", 3e-4, 1), ("full", 1e-4, 1)]
    assert names(trials, "pilot") == pilot
    assert {label for label, _, _ in names(trials, "rates")} == {"full"}
    assert names(trials, "final") == [("lift@3e-4", 3e-4, 0), ("full", 1e-4, 0)]


def test_one_rate_at_most_means_no_search():
    trials = run_all(design("lift", "full", most_rates=1, first=("full=1e-5",)), bowl({"lift": 1e-3, "full": 1e-4}))
    assert not names(trials, "rates")
    assert names(trials, "final")[:2] == [("lift", 1e-3, 0), ("full", 1e-5, 0)]


def test_a_name_twice_has_seeds_of_its_own():
    first, second, third = plan.read_entries(("lift", "lift", "lift@1e-4"), DEFAULTS, (), True)
    assert [first.label, second.label, third.label] == ["lift", "lift (2)", "lift@1e-4"]
    assert [first.first_seed, second.first_seed, third.first_seed] == [0, 1000, 0]
    assert [first.fixed, second.fixed, third.fixed] == [False, False, True]


def test_rates_that_diverge_are_left_and_a_method_without_any_other_has_no_final_run():
    lossy = bowl({"lift": 1e-3, "full": 1e-4})
    trials = run_all(design("lift", "full"), lambda t: None if t.rate > 3e-5 and t.label == "full" else lossy(t))
    assert ("full", 3e-5, 0) in names(trials, "final")
    trials = run_all(design("lift", "full"), lambda t: None if t.label == "full" else lossy(t))
    assert {label for label, _, _ in names(trials, "final")} == {"lift"}
    assert sum(label == "full" for label, _, _ in names(trials, "rates")) == 7 - 1


def test_a_method_that_cannot_run_is_left_out():
    trials = run_all(design("lift", "full"), bowl({"lift": 1e-3, "full": 1e-4}), failed={"full"})
    assert {trial.label for trial in trials} == {"base", "lift"}
    trials = run_all(design("lift", "full", "lora"), bowl({"lift": 1e-3, "lora": 1e-3}), failed={"full"})
    assert {label for label, _, _ in names(trials, "pilot")} == {"lift", "lora"}
    trials = run_all(design("lift", "full"), bowl({"lift": 1e-3, "full": 1e-4}), failed={"lift"})
    assert {trial.label for trial in trials} == {"base", "full"} and not names(trials, "pilot")


@pytest.mark.parametrize(
    "methods, first, message",
    [
        (("lfit",), (), "--methods lfit has the unknown method 'lfit'; use one of lift, random, full, lora"),
        (("lift@0",), (), "--methods lift@0 has the learning rate '0'; give a positive number, such as 3e-4"),
        (("lift@",), (), "--methods lift@ has the learning rate ''"),
        (("lift@nan",), (), "--methods lift@nan has the learning rate 'nan'"),
        (("lift",), ("lift=-1",), "--rates lift=-1 has the learning rate '-1'"),
        (("lift",), ("lift",), "--rates lift has the learning rate ''"),
        (("lift",), ("1e-3",), "--rates 1e-3 has the unknown method '1e-3'"),
        ((), (), "--methods names no method"),
    ],
)
def test_bad_entries_are_refused(methods, first, message):
    with pytest.raises(UserError) as error:
        plan.read_entries(methods, DEFAULTS, first, True)
    assert str(error.value).startswith(message)


def test_estimates_follow_the_finished_runs_of_this_machine():
    costs = Costs(train=10.0, evaluation={"base": 2.0, "pilot": 1.0, "rates": 1.0, "final": 4.0}, machine="a machine")
    assert costs.expected("base", "base", []) == 2.0
    assert costs.expected("rates", "lift", []) == 11.0
    rows = [make_row("pilot", "lift", 1e-3, 0, 1.0)]  # trains for 1 s, and the rest takes 1 s as was expected
    assert costs.expected("pilot", "lift", rows) == 2.0
    assert costs.expected("final", "full", rows) == 5.0
    assert Costs(10.0, costs.evaluation, "another machine").expected("final", "full", rows) == 14.0
    assert costs.total(plan.remaining(design("lift@1e-3", seeds=2), [], (), False), []) == 2 + 2 * 11 + 2 * 14


def test_a_run_of_the_pilot_that_a_search_has_made_is_known_and_not_counted():
    chosen = design("lift", "full", seeds=1)
    rows = [make_row("rates", "full", rate, 0, 0.5, "validation") for rate in (1e-4, 3e-4)]
    first = plan.Trial("pilot", chosen.entries[1], 1e-4, 0)
    assert plan.known(first, rows) == dataclasses.replace(rows[0], stage="pilot")
    others = [{"seed": 1}, {"rate": 1e-3}, {"stage": "final"}, {"entry": chosen.entries[0]}]
    assert [plan.known(dataclasses.replace(first, **other), rows) for other in others] == [None] * 4
    left = plan.remaining(chosen, rows, (), most=False)
    assert (left["pilot", "lift"], left["pilot", "full"]) == (2, 1)
