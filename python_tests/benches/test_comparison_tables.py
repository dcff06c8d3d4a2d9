"""The tables of comparisons in the READMEs: made of the losses of all samples in a CSV."""

import json
from dataclasses import replace

import pytest
from helpers.comparison_rows import make_row

from bench.tables.comparisons import comparison, findings
from bench.tables.render import rewrite
from bench.tables.types import Table, TableError
from lift_kernels.finetune.comparison.rows import add

MARKER = "<!-- table: sums (from runs.csv in compare-sums; python -m bench.tables) -->"
BASE = {"stage": "base", "method": "base", "rate": 0.0, "entries": 0, "train_seconds": 0.0, "correct": None}


def rows(shift: float) -> list:
    """Rows of three seeds in which random's losses are lift's and a shift."""
    losses = [[1.0 + 0.1 * i + 0.002 * ((i + seed) % 3) for i in range(8)] for seed in range(3)]
    base = make_row(**BASE, target_losses=(2.0,) * 8, neutral_losses=(3.0, 3.5, 4.0), answered=None)
    found = [base]
    for seed, own in enumerate(losses):
        common = {"seed": seed, "correct": None, "answered": None}
        found.append(make_row(method="lift", target_losses=tuple(own), **common))
        jitter = [0.001 * ((i * i + seed) % 3) for i in range(8)]
        found.append(
            make_row(method="random", target_losses=tuple(o + shift + j for o, j in zip(own, jitter)), **common)
        )
    return found


def text(tmp_path, shift: float) -> str:
    (tmp_path / "compare-sums").mkdir()
    add(tmp_path / "compare-sums" / "runs.csv", rows(shift))
    return rewrite(f"{MARKER}\nstale\n<!-- end -->\n", {"sums": Table("runs.csv", {}, whole=comparison)}, tmp_path)


def test_the_table_says_who_wins(tmp_path):
    lines = text(tmp_path, 0.3).splitlines()
    assert lines[0] == MARKER and lines[-1] == "<!-- end -->"
    first, second = (line.split(" | ") for line in lines[4:6])
    assert first[0] == "| lift" and first[5] == "reference"
    assert second[0] == "| random" and second[5] == "loses" and second[4].startswith("+0.30")
    assert any(line.startswith("Target loss: lift wins against random") for line in lines)
    assert "*2 cores; torch 2.11.0; commit abc1234*" in lines


def test_the_table_calls_a_tie_a_tie(tmp_path):
    lines = text(tmp_path, -0.001).splitlines()
    random = next(line for line in lines if line.startswith("| random")).split(" | ")
    assert random[5] == "tie"
    assert any(line.startswith("Target loss: lift ties with random") for line in lines)


def test_a_comparison_with_fewer_seeds_than_were_planned_is_not_finished(tmp_path):
    path = tmp_path / "runs.csv"
    add(path, rows(0))
    for seeds, finished in ((3, True), (4, False)):
        (tmp_path / "settings.json").write_text(json.dumps({"sums": {"seeds": seeds}}))
        assert comparison(path).startswith("| method |" if finished else "Not finished: 7 runs so far.")


@pytest.mark.parametrize(("missing", "seed"), [("lift", 0), ("random", 2)])
def test_a_comparison_that_has_not_come_to_its_end_says_how_to_go_on(tmp_path, missing, seed):
    (tmp_path / "compare-sums").mkdir()
    path = tmp_path / "compare-sums" / "runs.csv"
    searches = [
        replace(row, stage="rates", part="validation") for row in rows(0) if row.method != "base" and row.seed == 0
    ]
    there = [row for row in rows(0) if row.method != missing or row.seed < seed]
    add(path, [*searches, *there])
    command = "python -m lift_kernels compare --resume bench/results/compare-sums"
    assert comparison(path).startswith(f"Not finished: {2 + len(there)} runs so far. `{command}` goes on.")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TableError, match="runs.csv"):
        comparison(tmp_path / "runs.csv")


def test_what_was_found_is_a_sentence_for_each_file(tmp_path):
    """The neutral losses of these rows are those of the untrained model, so they tie."""
    files = []
    for task, shift in (("hard", 0.3), ("gsm8k", -0.3)):
        files.append(tmp_path / f"{task}.csv")
        add(files[-1], [replace(row, task=task) for row in rows(shift)])
    assert findings(*files).splitlines() == [
        "- On hard generated problems, LIFT's held-out loss wins against random; on neutral text it ties with random.",
        "- On GSM8K, LIFT's held-out loss loses to random; on neutral text it ties with random.",
    ]


def test_what_was_found_needs_final_runs(tmp_path):
    add(tmp_path / "runs.csv", [replace(row, task="hard") for row in rows(0) if row.method != "lift"])
    with pytest.raises(TableError, match="Not finished: 4 runs so far"):
        findings(tmp_path / "runs.csv")
