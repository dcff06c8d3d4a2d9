"""Renders tables from the rows of CSVs, and puts them between the markers of a text."""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bench import ROOT
from bench.common.results import TUNED
from bench.tables.types import Selection, Table, TableError

BLOCK = re.compile(
    r"^(<!-- table: (\S+) \(from (\S+\.csv(?:, \S+\.csv)*) in ([^\s,;]+(?:, [^\s,;]+)*);"
    r" python -m bench\.tables\) -->\n)(.*?)^<!-- end -->$",
    re.M | re.S,
)
RESULTS = ROOT / "bench" / "results"
UNITS = {"ms": 1e-3, "KiB": 2.0**10, "MiB": 2.0**20, "M": 1e6, "GB": 1e9, "T": 1e12}
ORIGIN = {
    "driver": "driver {}",
    "cuda": "CUDA {}",
    "torch": "torch {}",
    "triton": "triton {}",
    "compiler": "{}",
    "runs": "repeats: {}",
    "repeats": "repeats: {}",
    "commit": "commit {}",
}
NOTHING = "Not measured yet."


class Missing(Exception):
    """A field is empty in the CSV."""


class Partial(dict):
    """A row in which a column that its file lacks is empty."""

    def __missing__(self, column: str) -> str:
        return ""


@dataclass(frozen=True)
class Group:
    """The rows of a folder that were measured in one environment, and what a cell calls them."""

    label: str
    rows: Sequence[dict[str, str]]
    tuned: bool = False


class Cell(string.Formatter):
    """Formats cells: ``{alias.column:format}``, numbers where the CSV has numbers.

    A quotient is ``{a.x/b.y}``, whose divisor may be a unit of `UNITS`. Where an alias means
    several rows, the least and the largest number are given, or the different texts. The format
    ``reason`` drops from a text all before its last colon. A column that ends in ``?`` may be
    missing, which is as if it were empty. ``||`` separates alternatives: the first one without an
    empty field is taken, else the cell is empty.
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
        known = column.removesuffix("?")
        found = [row.get(known, "") if column != known else row[known] for row in picks[alias]]
        if not found or not all(found):
            raise Missing
        try:
            return sorted(float(text) for text in found)
        except ValueError:
            return found


def matching(rows: Sequence[dict], selection: Selection) -> list[dict]:
    """The rows that have these texts."""
    return [row for row in rows if all(fnmatchcase(row.get(column, ""), text) for column, text in selection.items())]


def select(rows: Sequence[dict], selection: Selection) -> list[dict]:
    """The rows that have these texts. TableError when none has."""
    found = matching(rows, selection)
    if not found:
        raise TableError(f"no row has {dict(selection)}; make the CSV again or change bench/tables/specs.py")
    return found


def picked(rows: Sequence[dict], picks: Mapping[str, Selection]) -> dict[str, list[dict]]:
    """The rows of each alias. One whose name ends in ``?`` may have none."""
    found = {}
    for alias, selection in picks.items():
        name = alias.removesuffix("?")
        found[name] = matching(rows, selection) if alias != name else select(rows, selection)
    return found


def lines_of(table: Table, group: Group) -> list[tuple[str, dict[str, list[dict]]]]:
    """The label and the rows of each line. One that begins with ``?`` may be missing."""
    lines = []
    for label, picks in table.rows[: table.tuned if group.tuned else None]:
        name = label.removeprefix("?")
        if label == name or all(matching(group.rows, selection) for selection in picks.values()):
            lines.append((name, picked(group.rows, picks)))
    find = matching if table.partial else select
    for selection in () if group.tuned else table.each:
        for row in find(group.rows, selection):
            named = {alias: matching([row], texts) for alias, texts in table.names.items()}
            lines.append(("", {"row": [row], **named}))
    return lines


def render(table: Table, groups: Sequence[Group]) -> str:
    """The Markdown table and a line on where its rows come from.

    Where there are several groups, their rows come one after the other, below a column of labels.
    A partial table without any row says so.
    """
    several = len(groups) > 1
    cells, used = [], []
    for group in groups:
        lines = lines_of(table, group)
        used.append([row for _, picks in lines for chosen in picks.values() for row in chosen])
        for label, picks in lines:
            try:
                found = [Cell().cell(text, picks, label) for text in table.columns.values()]
            except KeyError as error:
                raise TableError(f"{table.csv} has no column {error}, or the table no such alias") from error
            cells.append([group.label, *found] if several else found)
    if table.partial and not cells:
        return f"{NOTHING}\n"
    levels = any(row.get("level") for group in groups for row in group.rows)
    heads = ["level" if levels else "machine", *table.columns] if several else list(table.columns)
    filled = [i for i in range(len(heads)) if any(line[i] for line in cells)]
    cells = [[line[i] for i in filled] for line in without_repeats(cells, 2 if several else 1)]
    body = [[heads[i] for i in filled], ["---"] * len(filled), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in body) + f"\n\n*{origin(groups, used)}*\n"


def without_repeats(lines: Sequence[list[str]], depth: int) -> list[list[str]]:
    """Lines whose first ``depth`` cells are blank as long as they are like those above."""
    result, above = [], [""] * depth
    for line in lines:
        same = next((i for i in range(depth) if line[i] != above[i]), depth)
        result.append([""] * same + line[same:])
        above = line[:depth]
    return result


def origin(groups: Sequence[Group], used: Sequence[Sequence[dict]]) -> str:
    """Machines, levels and settings of the rows that were used, versions and commits.

    Several levels of one machine name it once.
    """
    every = [row for rows in used for row in rows]
    own = [(group.label, rows) for group, rows in zip(groups, used) if not group.tuned]
    shared = len(own) > 1 and len(distinct(every, "device")) == 1
    parts = distinct(every, "device") if shared else []
    for label, rows in own:
        device = [] if shared else [" and ".join(distinct(rows, "device"))]
        level = distinct(rows, "level") if len(own) == 1 else []
        said = ", ".join(filter(None, [*device, *level, *distinct(rows, "settings")]))
        parts.append(f"{label}: {said}" if said and len(own) > 1 and distinct(rows, "level") else said)
    if any(group.tuned for group in groups):
        parts.append("tuned: " + " ".join(f"{name}={value}" for name, value in TUNED.items()))
    parts += [text.format(" and ".join(distinct(every, key))) for key, text in ORIGIN.items() if distinct(every, key)]
    return "; ".join(filter(None, parts))


def distinct(rows: Sequence[dict], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows if row.get(column)))


def driver(path: Path) -> dict[str, str]:
    """The column ``driver`` from nvidia-smi's output in the log of a CSV, where it has one."""
    log = path.with_suffix(".log")
    found = re.search(r"Driver Version: ([\d.]+)", log.read_text(errors="replace")) if log.is_file() else None
    return {"driver": found[1]} if found else {}


def groups_of(folder: Path, files: Sequence[str], table: Table) -> list[Group]:
    """The rows of the files: those of the user's environment, and if ``tuned`` the others too.

    A file whose rows are all of one environment is taken as it is. A file that is missing has no
    rows where the table is partial.
    """
    first: list[dict[str, str]] = []
    second: list[dict[str, str]] = []
    for name in files:
        path = folder / name
        if not path.is_file():
            if table.partial:
                continue
            raise TableError(f"{path} is missing; run its bench, or take the table out of the README")
        kind, known = Partial if table.partial else dict, {"file": name, **driver(path)}
        with path.open(newline="") as file:
            rows = [kind(known | row) for row in csv.DictReader(file)]
        again = [row for row in rows if row.get("environment") == "tuned"]
        alone = len(again) == len(rows)
        first += rows if alone else [row for row in rows if row.get("environment") != "tuned"]
        second += [] if alone else again
    label = " and ".join(distinct(first, "level") or distinct(first, "device")) or folder.name
    again = [Group(f"{label}, tuned", second, tuned=True)] if second and table.tuned else []
    return [Group(label, first), *again]


def rewrite(text: str, tables: Mapping[str, Table], root: Path = RESULTS) -> str:
    """The text with every marked table rendered. ``root`` holds the folders of results.

    TableError names the table that cannot be made.
    """

    def replace(match: re.Match) -> str:
        marker, name, files, folders, _ = match.groups()
        if name not in tables or tables[name].csv != files:
            raise TableError(f"table {name}: bench/tables/specs.py describes none of that name from {files}")
        table, groups = tables[name], []
        try:
            if table.whole is not None:
                return (
                    f"{marker}\n{table.whole(*(root / folder / files for folder in folders.split(', ')))}\n<!-- end -->"
                )
            for folder in folders.split(", "):
                groups += groups_of(root / folder, files.split(", "), table)
            if len({group.label for group in groups}) < len(groups):
                raise TableError("two folders have the same level; show one of them, or tell their rows apart")
            return f"{marker}\n{render(table, groups)}\n<!-- end -->"
        except TableError as error:
            raise TableError(f"table {name} from {files} in {folders}: {error}") from None

    if len(BLOCK.findall(text)) != text.count("<!-- table:") or text.count("<!-- table:") != text.count("<!-- end -->"):
        raise TableError("a marker of a table is malformed, or not followed by <!-- end -->")
    return BLOCK.sub(replace, text)
