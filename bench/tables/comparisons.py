"""The tables of comparisons of fine-tuning methods, made of the rows of ``compare``.

Each is a table with intervals and the outcome in words. What all found is a sentence for each. They
are computed from the losses of all samples in the CSV, as the command itself does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables.types import Table, TableError
from lift_kernels.errors import UserError
from lift_kernels.finetune.comparison.options import read_saved
from lift_kernels.finetune.comparison.rows import Row, read
from lift_kernels.finetune.comparison.summary import Summary, summarize
from lift_kernels.finetune.comparison.verdict import markdown_table, outcomes, words

REFERENCE = "lift"
TASKS = {"hard": "hard generated problems", "gsm8k": "GSM8K"}


def comparison(path: Path) -> str:
    """The table of a file of one task, its outcome in words, and where its rows come from.

    Before all methods have all seeds it says how to go on.

    Raises:
        TableError: for a file that cannot be read.
    """
    rows, finished = _rows(path)
    if not finished:
        return _unfinished(path, rows)
    found = _summary(rows)
    text = words(found).replace("\n  ", "\n- ").replace("\n", "\n\n").replace("\n\n- ", "\n- ")
    return f"{markdown_table(found)}\n\n{text}\n\n*{origin(rows)}*\n"


def findings(*paths: Path) -> str:
    """A sentence for each file: against which methods the reference wins, ties and loses.

    Raises:
        TableError: for a file that cannot be read, or is not finished.
    """
    return "\n".join(_finding(path) for path in paths) + "\n"


def _finding(path: Path) -> str:
    rows, finished = _rows(path)
    if not finished:
        raise TableError(_unfinished(path, rows))
    found = _summary(rows)
    loss = outcomes([(m.name, m.target_difference) for m in found.others if m.target_difference], "loss")
    neutral = [(m.name, m.forgetting_difference) for m in found.others if m.forgetting_difference]
    return (
        f"- On {TASKS[found.task]}, LIFT's held-out loss {loss}; on neutral text it {outcomes(neutral, 'forgetting')}."
    )


def _rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a file, and whether its comparison is finished."""
    if not path.is_file():
        raise TableError(f"{path} is missing; run the comparison, or take the table out of the README")
    try:
        rows = read(path)
        return rows, _finished(rows, read_saved(path.parent))
    except UserError as error:
        raise TableError(str(error)) from error


def _summary(rows: Sequence[Row]) -> Summary:
    try:
        return summarize(rows, REFERENCE)
    except UserError as error:
        raise TableError(str(error)) from error


def _finished(rows: Sequence[Row], saved: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all methods have final runs with as many seeds as the saved settings say."""
    finals = Counter(row.method for row in rows if row.stage == "final")
    able = {row.method for row in rows if row.stage == "rates" and row.status == "ok"} | {REFERENCE}
    wanted = saved[rows[0].task]["seeds"] if rows and saved else max(1, finals[REFERENCE])
    return all(finals[method] >= wanted for method in able)


def _unfinished(path: Path, rows: Sequence[Row]) -> str:
    command = f"python -m lift_kernels compare --resume bench/results/{path.parent.name}"
    return f"Not finished: {len(rows)} runs so far. `{command}` goes on.\n\n*{origin(rows)}*\n"


def origin(rows: Sequence[Row]) -> str:
    """What the rows were run on."""
    parts = [" and ".join(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("machine", "torch", "commit")]
    return f"{parts[0]}; torch {parts[1]}; commit {parts[2]}"


COMPARISON_TABLES = {
    "findings": Table("runs.csv", {}, whole=findings),
    "compare-hard": Table("runs.csv", {}, whole=comparison),
    "compare-gsm8k": Table("runs.csv", {}, whole=comparison),
}
