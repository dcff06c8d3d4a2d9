"""Finished runs as rows of a CSV file, which may hold several tasks and can be committed."""

from __future__ import annotations

import csv
import io
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ...checkpoint.atomic_file import write_atomic
from ...errors import FileError

STAGES = ("base", "pilot", "rates", "final")
PARTS = ("validation", "test")
STATUSES = ("ok", "diverged")


@dataclass(frozen=True)
class Row:
    """One run, evaluated on one part of the data.

    Losses are rounded to six decimals and seconds to three, as in the file. So a row that was read
    equals the one that was written. The loss of a run is the mean over its samples, each with the
    same weight whatever its number of tokens. So a sample, not a token, is the unit of all
    statistics.
    """

    task: str
    """The data of the comparison."""
    stage: str
    """"base" for the untrained model, "pilot", "rates" or "final"."""
    method: str
    """Label of the method; "base" for the untrained model."""
    rate: float
    """Learning rate; 0 for the untrained model."""
    seed: int
    part: str
    """"validation" or "test"."""
    target_losses: tuple[float, ...]
    """Mean loss of each sample in nats per token, in a fixed order; empty if training diverged."""
    neutral_losses: tuple[float, ...]
    """The same of each piece of neutral text."""
    correct: tuple[int, ...] | None
    """1 or 0 for each question; None where no questions were asked."""
    answered: int | None
    """Questions with an answer of the right form, right or wrong; None where none were asked."""
    entries: int
    """Trained entries."""
    train_seconds: float
    """Seconds of the training steps."""
    seconds: float
    """Seconds of the whole run, with evaluation."""
    status: str
    """"ok" or "diverged"."""
    machine: str
    commit: str
    torch: str
    """Version of torch."""
    fingerprint: str
    """Of the model, the data and the settings that all rows of a task share."""

    def __post_init__(self) -> None:
        for name, allowed in (("stage", STAGES), ("part", PARTS), ("status", STATUSES)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(allowed)}")
        rounded: dict[str, object] = {name: tuple(round(float(x), 6) for x in getattr(self, name)) for name in _LOSSES}
        rounded |= {name: round(float(getattr(self, name)), 3) for name in ("train_seconds", "seconds")}
        for name, value in rounded.items():
            object.__setattr__(self, name, value)
        if self.correct is not None:
            object.__setattr__(self, "correct", tuple(int(x) for x in self.correct))
            if not set(self.correct) <= {0, 1}:
                raise ValueError("correct has values other than 0 and 1")
        if self.status == "diverged" and self._losses():
            raise ValueError("a run that diverged has no losses")
        if self.status == "ok" and not (self.target_losses and all(map(math.isfinite, self._losses()))):
            raise ValueError("a run that is ok needs finite losses")

    def _losses(self) -> tuple[float, ...]:
        return self.target_losses + self.neutral_losses

    @property
    def target_loss(self) -> float:
        """Mean loss of the samples in nats per token; inf if training diverged."""
        return statistics.fmean(self.target_losses) if self.status == "ok" else math.inf

    @property
    def neutral_loss(self) -> float:
        """Mean loss of the neutral text in nats per token; inf if training diverged."""
        return statistics.fmean(self.neutral_losses) if self.status == "ok" and self.neutral_losses else math.inf

    @property
    def accuracy(self) -> float | None:
        """Share of the questions that were answered right; None where none were asked."""
        return statistics.fmean(self.correct) if self.correct else None

    @property
    def key(self) -> tuple[str, str, str, float, int, str]:
        """What a row is of: task, stage, method, rate, seed and part. A file has each once."""
        return self.task, self.stage, self.method, self.rate, self.seed, self.part


_LOSSES = ("target_losses", "neutral_losses")
_FIELDS = tuple(field.name for field in fields(Row))
_MEANS = ("target_loss", "neutral_loss", "accuracy")
COLUMNS = (*_FIELDS[:6], *_MEANS, *(name for name in _FIELDS[6:] if name not in _LOSSES), *_LOSSES)
"""Columns of the file. The means are for people: they follow from the rest."""


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name)
    if value is None:
        return ""
    if name in _LOSSES:
        return " ".join(f"{loss:.6f}" for loss in value)
    if name == "correct":
        return "".join(map(str, value))
    if name in _MEANS:
        return f"{value:.6f}"
    return f"{value:.3f}" if name in ("train_seconds", "seconds") else str(value)


def _parsed(cells: dict[str, str]) -> Row:
    """The row of the cells of a line; raises ValueError with the reason."""
    values: dict[str, object] = {name: cells[name] for name in _FIELDS}
    for name in _LOSSES:
        values[name] = tuple(map(float, cells[name].split()))
    for name in ("rate", "train_seconds", "seconds"):
        values[name] = float(cells[name])
    for name in ("seed", "entries"):
        values[name] = int(cells[name])
    values["correct"] = tuple(map(int, cells["correct"])) or None
    values["answered"] = int(cells["answered"]) if cells["answered"] else None
    row = Row(**values)  # type: ignore[arg-type]
    for name in _MEANS:
        expected = _cell(row, name)
        if _number(expected) != _number(cells[name]):
            raise ValueError(f"{name} is {cells[name]} and not {expected}, as its samples say")
    return row


def _number(cell: str) -> float | None:
    """The number of a cell, in which a spreadsheet may have left out final zeros."""
    return float(cell) if cell else None


def _whole_lines(path: Path) -> str:
    """The text of a file up to its last end of line. What follows is dropped, and that is said."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}; restore it, or choose another --output") from error
    whole, end, rest = content.rpartition(b"\n")
    if rest:
        line = content.count(b"\n") + 1
        print(f"{path}: line {line} is only half written and is dropped; its run is lost")
    try:
        return (whole + end).decode("utf-8-sig")  # a spreadsheet may have put a byte order mark in front
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} is no CSV file of a comparison: it is not text; restore it, or choose another --output"
        ) from error


def read(path: str | Path, task: str | None = None, fingerprint: str | None = None) -> list[Row]:
    """Return the rows of a file, in its order; none where there is no file.

    Args:
        path: the CSV file.
        task: return the rows of this task alone; None for all.
        fingerprint: what these rows must be of; None takes any.

    Raises:
        FileError: if a line is not a row, stands there twice, or has another fingerprint. The
            message names file, line and remedy.
    """
    csv.field_size_limit(sys.maxsize)  # a cell holds the losses of all samples
    lines = csv.reader(io.StringIO(_whole_lines(Path(path)), newline=""))
    header = next(lines, None)
    if header is not None and tuple(header) != COLUMNS:
        raise FileError(
            f"{path}: line 1 does not have the columns of a comparison of this version; restore it, or choose another "
            "--output"
        )
    rows: dict[tuple, tuple[Row, int]] = {}
    for cells in lines:
        number = lines.line_num
        if len(cells) != len(COLUMNS):
            raise FileError(f"{path}: line {number} has {len(cells)} cells, not {len(COLUMNS)}; delete the line")
        try:
            row = _parsed(dict(zip(COLUMNS, cells)))
        except ValueError as error:
            raise FileError(f"{path}: line {number} is no row of a comparison ({error}); delete the line") from error
        if task not in (None, row.task):
            continue
        _check(path, number, row, fingerprint)
        if row.key in rows:
            raise FileError(
                f"{path}: lines {rows[row.key][1]} and {number} are the same run ({_name(row)}); delete one"
            )
        rows[row.key] = row, number
    return [row for row, _ in rows.values()]


def _name(row: Row) -> str:
    return f"{row.task}, {row.stage}, {row.method}, rate {row.rate:g}, seed {row.seed}, {row.part}"


def _check(path: str | Path, number: int, row: Row, fingerprint: str | None) -> None:
    if fingerprint not in (None, row.fingerprint):
        raise FileError(
            f"{path}: line {number} ({_name(row)}) is of another model, other data or other settings: its fingerprint "
            f"is {row.fingerprint}, not {fingerprint}; choose another --output or --task, or delete the task's lines"
        )


def append(path: str | Path, row: Row) -> None:
    """Add a row to a file, which is made if there is none.

    The new file is written beside the old one and takes its name when it is whole and on the disk.
    Only one process may append at a time.

    Raises:
        FileError: when the disk is full or the file cannot be written.
    """
    add(path, [row])


def add(path: str | Path, rows: Sequence[Row]) -> None:
    """Add several rows, such as those of one run on both parts: all or none; see `append`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    whole = _whole_lines(Path(path))
    if not whole:
        writer.writerow(COLUMNS)
    for row in rows:
        cells = [_cell(row, name) for name in COLUMNS]
        if any("\n" in cell or "\r" in cell for cell in cells):
            raise ValueError("a cell of a row has an end of line")
        writer.writerow(cells)
    write_atomic(path, whole + text.getvalue())
