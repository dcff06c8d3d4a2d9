"""The table, the words and the picture of a comparison whose outcome is known."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.comparison_rows import make_row

from lift_kernels.errors import UserError
from lift_kernels.finetune import comparison
from lift_kernels.finetune.comparison import picture, statistics, summary, verdict

EFFECTS = {"lift": (0.0, 0.02), "random": (0.0005, 0.02), "full": (-0.1, 0.2), "lora": (0.1, 0.01)}
"""What each method adds to the target loss and to forgetting."""
RATES = (3e-4, 1e-3, 3e-3)


def comparison_rows(seeds=3, effects=EFFECTS, pilot=False, rates=RATES, questions=30):
    """Rows of a task: methods differ by their effects, seeds by 0.002 and samples by 0.05."""
    rng = np.random.default_rng(5)
    hardness, neutral = {"test": rng.gamma(4, 0.3, 80), "validation": rng.gamma(4, 0.3, 40)}, 3 + rng.random(20)

    def row(part, target, forgetting, **changes):
        return make_row(
            part=part,
            target_losses=hardness[part] + target + 0.05 * rng.normal(size=len(hardness[part])),
            neutral_losses=neutral + forgetting + 0.002 * rng.normal(size=20),
            correct=tuple(rng.random(questions) < 0.5) if part == "test" and questions else None,
            **changes,
        )

    rows = [row(part, 1.0, 0.0, stage="base", method="base", rate=0.0, entries=0) for part in hardness]
    for name, seed in ((name, seed) for name in list(effects)[:2] for seed in range(2 if pilot else 0)):
        rows.append(row("validation", 0.2 + effects[name][0], 0.02, stage="pilot", method=name, seed=seed))
    for name, (target, forgetting) in effects.items():
        for rate in rates:
            worse = 0.1 * abs(rates.index(rate) - 1)
            rows.append(row("validation", 0.2 + target + worse, forgetting, stage="rates", method=name, rate=rate))
        for seed in range(seeds):
            moved = 0.002 * rng.normal()
            rows.append(row("test", 0.2 + target + moved, forgetting + moved, method=name, seed=seed))
    return rows


def test_the_summary_finds_wins_ties_and_losses():
    found = summary.summarize(comparison_rows())
    assert [m.name for m in found.methods][0] == "full" and [m.name for m in found.methods][-1] == "lora"
    outcomes = {m.name: (m.target_difference.outcome, m.forgetting_difference.outcome) for m in found.others}
    assert outcomes == {"random": ("tie", "tie"), "full": ("wins", "loses"), "lora": ("loses", "wins")}
    full, lift = found.method("full"), found.method("lift")
    assert lift.target_difference is None
    assert full.target_difference.estimate.mean == pytest.approx(full.target.mean - lift.target.mean)
    assert full.forgetting_difference.estimate.mean == pytest.approx(full.forgetting.mean - lift.forgetting.mean)
    assert full.gain.mean == pytest.approx(found.base.target_loss - full.target.mean)
    assert full.forgetting.low < 0.2 < full.forgetting.high and full.gain.low < 0.9 < full.gain.high
    assert full.target_difference.p >= full.target_difference.estimate.p
    assert full.seeds == (0, 1, 2) and full.unfinished is None


def test_the_words_call_a_tie_a_tie():
    text = verdict.words(summary.summarize(comparison_rows()), ["other models", "other data"])
    lines = text.splitlines()
    assert lines[0].startswith("sums: 3 seeds, 80 test samples, 20 pieces of neutral text. ")
    assert "Holm's correction for all 6 comparisons of losses" in lines[0]
    assert lines[1].startswith("Target loss: lift wins against lora, ties with random, loses to full. ")
    assert lines[2].startswith("  loses to full: -0.") and "finds" not in lines[2]
    assert lines[3].startswith("  ties with random: ") and "; this design finds differences from 0.0" in lines[3]
    assert lines[6].startswith("Forgetting: lift forgets less than full, ties with random, forgets more than lora. ")
    assert lines[-2].startswith("Accuracy minus lift's, in points, without a correction: full ")
    assert lines[-1] == "Not looked at: other models, other data."
    assert "One seed" not in text and "may not be its best" not in text


def test_what_a_design_finds_is_also_a_share_of_what_training_gained():
    found = summary.summarize(comparison_rows())
    finds, gain = found.method("random").target_difference.estimate.finds, found.method("lift").gain.mean
    target, forgetting = verdict.words(found).split("Forgetting: ")
    assert f"finds differences from {finds:.4f} on ({finds / gain:.1%} of what training gained)" in target
    assert "of what training gained" not in forgetting
    useless = summary.summarize(comparison_rows(effects={"lift": (2.0, 0.0), "random": (2.0, 0.0)}))
    assert useless.method("lift").gain.mean < 0
    assert "of what training gained" not in verdict.words(useless)


def test_the_words_say_what_the_design_finds_with_every_method():
    found = summary.summarize(comparison_rows())
    finds = {m.name: m.target_difference.estimate.finds for m in found.others}
    least = max(finds, key=finds.get)
    share = finds[least] / found.method("lift").gain.mean
    target, forgetting = verdict.words(found).split("Forgetting: ")
    assert target.endswith(
        f"\nWith every method this design finds differences from {finds[least]:.4f} on ({share:.1%} of what training "
        f"gained); only {least} needs as much.\n"
    )
    assert forgetting.count("With every method this design finds differences from 0.0") == 1
    alone = summary.summarize(comparison_rows(effects={"lift": (0.0, 0.0), "random": (0.0, 0.0)}))
    assert "With every method" not in verdict.words(alone)


def test_holms_correction_counts_both_losses_of_every_method():
    found = summary.summarize(comparison_rows())
    pairs = {(m.name, d): d for m in found.others for d in (m.target_difference, m.forgetting_difference)}
    assert len(pairs) == 6
    assert {key: d.p for key, d in pairs.items()} == statistics.holm({key: d.estimate.p for key, d in pairs.items()})


def test_a_table_says_what_it_is_of_and_its_units():
    text = verdict.caption(summary.summarize(comparison_rows()), "tiny model")
    assert text.startswith("tiny model, sums. Losses are in nats per token, with half of a 95 % interval. ")


def test_a_loss_of_neutral_text_that_fell_is_not_called_forgetting():
    text = verdict.words(summary.summarize(comparison_rows(effects={"lift": (0.0, -0.05), "lora": (0.0, -0.2)})))
    assert "Forgetting: lift forgets more than lora. " in text
    assert "Nothing was forgotten with lora, lift: the loss of neutral text fell. There, to forget more means" in text
    assert "Nothing was forgotten" not in verdict.words(summary.summarize(comparison_rows()))


def test_the_pilot_is_that_of_the_reference_and_the_next_method():
    rows = comparison_rows(seeds=1, pilot=True)
    pilot = {(row.method, row.seed): row for row in rows if row.stage == "pilot"}
    assert list(pilot) == [("lift", 0), ("lift", 1), ("random", 0), ("random", 1)]
    losses = {key: np.array(row.target_losses) for key, row in pilot.items()}
    d = np.stack([losses["random", seed] - losses["lift", seed] for seed in range(2)])
    base = np.mean(summary.base_row(rows, "validation").target_losses)
    gained = base - (losses["lift", 0].mean() + losses["lift", 1].mean()) / 2
    found, expected = summary.planned(rows, "lift", 1, 80), statistics.smallest_difference(d, gained, 1, 80)
    assert (found.nats, found.share) == pytest.approx((expected.nats, expected.share))
    more = [replace(row, method="full", rate=1e-4) for row in pilot.values() if row.method == "lift"]
    assert summary.planned([*rows, *more], "lift", 1, 80) == found
    assert summary.summarize([*rows, *more]) == summary.summarize(rows)


def test_seeds_that_move_both_methods_alike_hide_no_difference():
    """The pilot counts what remains of a seed in the difference of two methods."""

    def moved(row):
        shift = 0.5 * row.seed if row.stage == "pilot" else 0.0
        return replace(row, target_losses=tuple(loss + shift for loss in row.target_losses))

    rows = comparison_rows(seeds=1, pilot=True)
    both = rows, [moved(row) for row in rows]
    before, after = (summary.planned(of, "lift", 3, 80) for of in both)
    assert after.nats == pytest.approx(before.nats)
    before, after = (summary.summarize(of) for of in both)
    errors = [found.method("full").target_difference.estimate.error for found in (before, after)]
    assert errors[0] == pytest.approx(errors[1])
    assert after.method("lift").target.error > 0.3 > before.method("lift").target.error


def test_a_pilot_of_one_method_does_not_say_what_is_found():
    rows = [row for row in comparison_rows(seeds=1, pilot=True) if (row.stage, row.method) != ("pilot", "random")]
    assert summary.planned(rows, "lift", 1, 80) is None
    found = summary.summarize(rows)
    assert found.method("lift").target.seed_part == "pilot"
    assert found.method("full").target_difference.estimate.seed_part == "unknown"


def test_runs_of_the_pilot_at_several_rates_are_refused():
    rows = comparison_rows(seeds=1, pilot=True)
    more = [replace(row, rate=1e-4, seed=2) for row in rows if (row.stage, row.method) == ("pilot", "random")]
    with pytest.raises(UserError, match="the runs of random in the pilot differ in their rate; delete the rows of one"):
        summary.summarize([*rows, *more])


def test_the_table_has_a_line_for_each_method_by_its_loss():
    found = summary.summarize(comparison_rows())
    header, rule, *lines = verdict.text_table(found).splitlines()
    assert [line.split()[0] for line in lines] == [m.name for m in found.methods]
    assert set(rule) == {"-"} and "minus lift's" in header
    full = found.method("full")
    digits = verdict.decimals(found)
    half = full.target.high - full.target.mean
    assert f"{full.target.mean:.{digits}f} ± {half:.{digits}f}" in lines[0]
    assert "1,234" in lines[0] and lines[0].endswith("12")
    markdown = verdict.markdown_table(found).splitlines()
    assert len(markdown) == 6 and markdown[1] == "|" + " --- |" * 11
    cells = [cell.strip() for cell in markdown[2].strip("|").split("|")]
    assert (cells[0], cells[1], cells[5], cells[7]) == ("full", "0.001", "wins", "loses")


def test_one_seed_says_how_little_it_means():
    text = verdict.words(summary.summarize(comparison_rows(seeds=1)))
    assert text.startswith("sums: 1 seed, ")
    assert "One seed says little. The intervals hold for these very runs" in text


def test_one_seed_with_a_pilot_has_wider_intervals():
    rows = comparison_rows(seeds=1, pilot=True)
    with_pilot, without = summary.summarize(rows), summary.summarize([r for r in rows if r.stage != "pilot"])
    wide, narrow = (found.method("full").target_difference.estimate for found in (with_pilot, without))
    assert wide.seed_part == "pilot" and narrow.seed_part == "unknown" and wide.error > narrow.error
    text = verdict.words(with_pilot, design=summary.planned(rows, "lift", 1, 80))
    assert "was taken from a pilot of 2 seeds" in text and "hold for these very runs" not in text
    assert "The rough figure of the pilot was: target differences from 0." in text and "of what training gained" in text
    assert summary.planned([r for r in rows if r.stage != "pilot"], "lift", 3, 80) is None


def test_a_search_that_ended_at_its_limit_is_named():
    found = summary.summarize(comparison_rows(rates=(3e-4, 1e-3)))
    assert "The rate of lora may not be its best: the search ended at its limit, and the best rate, 0.001, is " in (
        verdict.words(found)
    )
    assert " 0.001* " in verdict.text_table(found) and r" 0.001\* " in verdict.markdown_table(found)


def test_a_method_that_diverged_is_not_compared():
    gone = dict(status="diverged", target_losses=(), neutral_losses=(), correct=None, answered=None)
    rows = [
        *comparison_rows(),
        *(make_row(method="shira", seed=s, **(gone if s else {"target_losses": [1.0] * 80})) for s in range(3)),
    ]
    found = summary.summarize(rows)
    assert found.methods[-1].name == "shira" and found.methods[-1].target_difference is None
    assert "shira diverged with 2 of 3 seeds and is not compared." in verdict.words(found)
    assert "diverged with 2 of 3 seeds" in verdict.text_table(found)
    rows = [r for r in comparison_rows() if (r.method, r.stage, r.seed) != ("lift", "final", 0)]
    text = verdict.words(summary.summarize([*rows, make_row(**gone)]))
    assert "lift diverged with 1 of 3 seeds and is not compared." in text and "Target loss" not in text


def test_methods_are_compared_on_their_common_seeds():
    rows = [r for r in comparison_rows() if (r.method, r.stage, r.seed) != ("lora", "final", 1)]
    found = summary.summarize(rows)
    assert found.method("lora").target_difference.estimate.seeds == 2
    assert "lora has 2 seeds and lift 3; common seeds are compared." in verdict.words(found)
    assert "Intervals of two seeds may cover the truth in 88 % instead of 95 %." in verdict.words(found)


def test_a_method_without_a_final_run_is_named():
    rows = [r for r in comparison_rows() if (r.method, r.stage) != ("lora", "final")]
    gone = dict(status="diverged", target_losses=(), neutral_losses=(), correct=None, answered=None)
    rows += [make_row(stage="rates", part="validation", method="shira", rate=rate, **gone) for rate in RATES]
    text = verdict.words(summary.summarize(rows))
    assert "lora has no final run: it has not been trained yet." in text
    assert "shira has no final run: every rate diverged." in text


def test_a_difference_that_holds_alone_but_not_among_many_is_a_tie_and_explained():
    effects = {"lift": (0.0, 0.0), "x": (0.018, 0.0)} | {f"m{i}": (0.0, 0.0) for i in range(8)}
    found = summary.summarize(comparison_rows(effects=effects))
    difference = found.method("x").target_difference
    assert difference.estimate.p < 0.05 < difference.p and difference.outcome == "tie"
    assert f"alone it would be called, as one of 18 it is not (Holm's p = {difference.p:.3f})" in verdict.words(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r.method != "lift",
            "there is no final run of lift .there are runs of: random, full, lora.; name an",
        ),
        (lambda r: r.stage != "base", "the untrained model has no row for the test part; run the comparison again"),
        (lambda r: r.stage != "final", "there is no final run of lift .there are runs of: none."),
        (lambda r: r.method != "lora" or r.seed == 2, "lora and lift have no seed in common"),
    ],
)
def test_missing_rows_are_named(change, message):
    rows = [r for r in comparison_rows() if change(r) and (r.method, r.seed) != ("lift", 2)]
    with pytest.raises(UserError, match=message):
        summary.summarize(rows)


def test_rows_that_do_not_fit_together_are_named():
    rows = comparison_rows()
    with pytest.raises(UserError, match="final runs of lora have the rates 0.001 and 0.01; delete the rows of one"):
        summary.summarize([*rows, make_row(method="lora", rate=0.01, seed=9)])
    with pytest.raises(UserError, match="runs of sums have 2 and 80 samples; delete one sort"):
        summary.summarize([*rows, make_row(method="lora", seed=9)])


def test_the_picture_is_a_png_with_every_method(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    effects = {"lift": (0.0, 0.02)} | {f"method {i}": (0.02 * i, 0.03 * i) for i in range(10)}
    rows = comparison_rows(effects=effects)
    found = summary.summarize(rows)
    picture.draw(rows, found, "tiny model", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    axes, legend = figures[0].axes[0], figures[0].legends[0]
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:11] == [f"{m.name} (0.001)" for m in found.methods]
    assert axes.get_title() == "tiny model, sums" and "(nats per token)" in axes.get_xlabel() + axes.get_ylabel()
    styles = picture._styles(found)
    assert len(set(styles.values())) == len({color for color, _ in styles.values()}) == 11
    assert len({marker for _, marker in styles.values()}) == 11
    assert legend.get_title().get_text() == "method (learning rate)"
    assert texts[11:] == ["rates tried\n(validation, one seed)", "final runs, 95 % interval\n(test, seeds: 3)"]
    for m in found.methods:
        assert axes.get_xlim()[0] < m.forgetting.low and m.forgetting.high < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < -m.gain.high and -m.gain.low < axes.get_ylim()[1]
    lines = {line.get_color(): line for line in axes.lines if len(line.get_xdata()) == len(RATES)}
    assert len(lines) == 11
    base = summary.base_row(rows, "validation").target_loss
    assert sorted(lines["black"].get_ydata()) == sorted(x - base for x in summary.tried(rows, "lift").values())


def test_a_picture_without_neutral_text_is_refused(tmp_path):
    rows = [replace(row, neutral_losses=()) for row in comparison_rows()]
    found = summary.summarize(rows)
    assert found.methods[0].forgetting is None and "Forgetting" not in verdict.words(found)
    with pytest.raises(UserError, match="no final run of sums has a loss of neutral text"):
        picture.draw(rows, found, "tiny", tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["rows", "rates", "student", "statistics", "summary", "verdict", "picture"])
def test_the_modules_import_no_large_library_at_their_top(name):
    for node in ast.parse((Path(comparison.__file__).parent / f"{name}.py").read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "matplotlib"}
