"""Renders tables from the rows of CSVs, and puts them between the markers of a text."""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from bench import ROOT
from bench.tables.types import Selection, Table, TableError

BLOCK = re.compile(
    r"^(<!-- table: (\S+) \(from (\S+\.csv(?:, \S+\.csv)*); python -m bench\.tables\) -->\n)(.*?)^<!-- end -->$",
    re.M | re.S,
)
UNITS = {"ms": 1e-3, "KiB": 2.0**10, "MiB": 2.0**20, "M": 1e6, "GB": 1e9, "T": 1e12}
ORIGIN = {"device": "{}", "torch": "torch {}", "compiler": "{}", "runs": "repeats: {}", "commit": "commit {}"}


class Missing(Exception):
    """A field is empty in the CSV."""


class Cell(string.Formatter):
    """Formats cells: ``{alias.column:format}``, numbers where the CSV has numbers.

    A quotient is ``{a.x/b.y}``, whose divisor may be a unit of `UNITS`. Where an alias means
    several rows, the least and the largest number are given, or the different texts. The format
    ``reason`` drops from a text all before its last colon. ``||`` separates alternatives: the first
    one without an empty field is taken, else the cell is empty.
    """

    def cell(self, text: str, picks: Mapping[str, Sequence[Mapping[str, str]]], label: str) -> str:
        for alternative in text.split("||"):
            try:
                return self.vformat(alternative, (), {"label": label, **picks})
            except Missing:
                continue
        return ""

    def get_field(self, field_name, args, kwargs):
        if field_name == "label":
            return kwargs["label"], field_name
        values, *divisors = (self._values(part, kwargs) for part in field_name.split("/"))
        for divisor in divisors:
            values = [value / divisor[0] for value in values]
        return values, field_name

    def format_field(self, value, format_spec):
        if isinstance(value, str):
            return value
        if isinstance(value[0], str):
            if format_spec == "reason":
                value = [text.rpartition(": ")[2] for text in value]
            return ", ".join(dict.fromkeys(value)).replace("|", r"\|")
        return "..".join(
            dict.fromkeys(format(number, format_spec or "g").replace("%", " %") for number in (value[0], value[-1]))
        )

    def _values(self, name: str, picks: Mapping) -> list:
        """Sorted numbers or, if one of them is none, texts in their order."""
        if name in UNITS:
            return [UNITS[name]]
        alias, column = name.split(".")
        found = [row[column] for row in picks[alias]]
        if not all(found):
            raise Missing
        try:
            return sorted(float(text) for text in found)
        except ValueError:
            return found


def select(rows: Sequence[dict], selection: Selection) -> list[dict]:
    """The rows that have these texts. TableError when none has."""
    found = [row for row in rows if all(fnmatchcase(row.get(column, ""), text) for column, text in selection.items())]
    if not found:
        raise TableError(f"no row has {dict(selection)}; make the CSV again or change bench/tables/specs.py")
    return found


def render(table: Table, rows: Sequence[dict]) -> str:
    """The Markdown table and a line on where its rows come from."""
    lines = [(label, {alias: select(rows, one) for alias, one in picks.items()}) for label, picks in table.rows]
    lines += [("", {"row": [row]}) for selection in table.each for row in select(rows, selection)]
    used = [row for _, picks in lines for chosen in picks.values() for row in chosen]
    cells, above = [], ""
    for label, picks in lines:
        try:
            first, *others = (Cell().cell(text, picks, label) for text in table.columns.values())
        except KeyError as error:
            raise TableError(f"{table.csv} has no column {error}, or the table no such alias") from error
        cells.append([first if first != above else "", *others])
        above = first
    body = [list(table.columns), ["---"] * len(table.columns), *cells]
    origin = [
        text.format(" and ".join(distinct(used, column))) for column, text in ORIGIN.items() if distinct(used, column)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in body) + f"\n\n*{'; '.join(origin)}*\n"


def distinct(rows: Sequence[dict], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def rewrite(text: str, tables: Mapping[str, Table], root: Path = ROOT) -> str:
    """The text with every marked table rendered.

    TableError names the table that cannot be made.
    """

    def replace(match: re.Match) -> str:
        marker, name, sources, _ = match.groups()
        paths = [Path(path) for path in sources.split(", ")]
        files = ", ".join(path.name for path in paths)
        if name not in tables or tables[name].csv != files:
            raise TableError(f"table {name}: bench/tables/specs.py describes none of that name from {files}")
        rows: list[dict] = []
        for path in paths:
            if not (root / path).is_file():
                raise TableError(f"table {name}: {path} is missing; run its bench, or take the table out of the README")
            with (root / path).open(newline="") as file:
                rows += [{"file": path.name, **row} for row in csv.DictReader(file)]
        try:
            return f"{marker}\n{render(tables[name], rows)}\n<!-- end -->"
        except TableError as error:
            raise TableError(f"table {name} from {sources}: {error}") from None

    if len(BLOCK.findall(text)) != text.count("<!-- table:") or text.count("<!-- table:") != text.count("<!-- end -->"):
        raise TableError("a marker of a table is malformed, or not followed by <!-- end -->")
    return BLOCK.sub(replace, text)
