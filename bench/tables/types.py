"""The description of a table: columns, lines, and the rows of a CSV that they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Selection = Mapping[str, str]
"""CSV column to the text that a row has there. ``*`` stands for anything.

The column ``file`` is the name of the CSV.
"""

Rows = list[tuple[str, Mapping[str, Selection]]]
"""The label of each line, and which rows of the CSV the fields of its cells mean, by alias.

An alias that ends in ``?`` may have no row. Then its cells are empty. A line whose label begins
with ``?`` is left out where one of its aliases has no row.
"""


class TableError(ValueError):
    """A marked table cannot be made."""


@dataclass(frozen=True)
class Table:
    """A Markdown table made of the rows of a CSV, or of several.

    Attributes:
        csv: the name of the CSV, or several names with commas in between.
        columns: headers and the format of their cells, as `bench.tables.render.Cell` reads it.
        rows: one line each, its ``label`` (a field of that name) and which rows of the CSV its
            other fields mean, by alias.
        each: a line for every selected row of the CSV, under the alias ``row``.
        names: further aliases in a line of ``each``. Each has the line's row where that has these
            texts, else none.
        tuned: how many of ``rows`` are shown again, as measured with other settings.
        partial: shows what there is. Files, rows and columns may be missing.
        whole: makes the text from the paths of the file in all folders, in place of all the above.

    The rows of several folders come one after the other. Then a column says which level of the
    compiled code they were measured with, or on which card. A first cell like the one above it is
    left blank. A column without any text is left out.
    """

    csv: str
    columns: Mapping[str, str]
    rows: Sequence[tuple[str, Mapping[str, Selection]]] = ()
    each: Sequence[Selection] = field(default=())
    names: Mapping[str, Selection] = field(default_factory=dict)
    tuned: int = 0
    partial: bool = False
    whole: Callable[..., str] | None = None
