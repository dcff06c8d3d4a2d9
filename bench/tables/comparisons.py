"""The tables of comparisons of fine-tuning methods, made of the rows of ``compare``.

Each is a table with intervals and the outcome in words. Both are computed from the losses of all
samples in the CSV, as the command itself does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.tables.types import Table, TableError
from lift_kernels.errors import UserError
from lift_kernels.finetune.comparison.rows import Row, read
from lift_kernels.finetune.comparison.summary import summarize
from lift_kernels.finetune.comparison.verdict import markdown_table, words

REFERENCE = "lift"


def comparison(path: Path) -> str:
    """The table of a file of one task, its outcome in words, and where its rows come from.

    Without a final run of the reference it says how to go on.

    Raises:
        TableError: for a file that cannot be read.
    """
    if not path.is_file():
        raise TableError(f"{path} is missing; run the comparison, or take the table out of the README")
    try:
        rows = read(path)
        if not any(row.stage == "final" and row.method == REFERENCE for row in rows):
            command = f"python -m lift_kernels compare --resume bench/results/{path.parent.name}"
            return f"Not finished: {len(rows)} runs so far. `{command}` goes on.\n\n*{origin(rows)}*\n"
        found = summarize(rows, REFERENCE)
    except UserError as error:
        raise TableError(str(error)) from error
    text = words(found).replace("\n  ", "\n- ").replace("\n", "\n\n").replace("\n\n- ", "\n- ")
    return f"{markdown_table(found)}\n\n{text}\n\n*{origin(rows)}*\n"


def origin(rows: Sequence[Row]) -> str:
    """What the rows were run on."""
    parts = [" and ".join(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("machine", "torch", "commit")]
    return f"{parts[0]}; torch {parts[1]}; commit {parts[2]}"


COMPARISON_TABLES = {name: Table("runs.csv", {}, whole=comparison) for name in ("compare-hard",)}
