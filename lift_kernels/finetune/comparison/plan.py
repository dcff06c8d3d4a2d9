"""Which run comes next: a function of the design and of the rows of finished runs.

A comparison has four stages. The untrained model is measured ("base"). The first two methods run
with two seeds each ("pilot"), and their first runs count as tries of their rates, too. Every method
without a fixed rate gets one by the validation loss of seed 0 ("rates"). Every method runs at its
rate with all seeds and is measured on the test part ("final"). The next run depends on the rows
alone, so a comparison that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import UserError
from .rates import best_rate, next_rate
from .rows import Row
from .summary import tried

BASE = "base"
PILOT_METHODS = 2
PILOT_SEEDS = 2
SEEDS_APART = 1000
"""Between the seeds of a method and those of the same method's next entry."""


@dataclass(frozen=True)
class Entry:
    """A method of a comparison.

    Attributes:
        label: its name in rows and tables, such as "lift (2)".
        method: the method of finetune.
        rate: the first learning rate of its search, or the only one.
        fixed: whether that is the only one.
        first_seed: the random seed of its run with seed 0.
    """

    label: str
    method: str
    rate: float
    fixed: bool
    first_seed: int


@dataclass(frozen=True)
class Trial:
    """One run: an entry at a rate with a seed. The untrained model has no entry."""

    stage: str
    entry: Entry | None
    rate: float
    seed: int

    @property
    def label(self) -> str:
        """The method in rows and tables."""
        return BASE if self.entry is None else self.entry.label


@dataclass(frozen=True)
class Design:
    """What a comparison runs.

    Attributes:
        entries: the methods; the first is the reference.
        seeds: seeds of each method in the final stage.
        most_rates: the most rates that a search tries.
    """

    entries: tuple[Entry, ...]
    seeds: int
    most_rates: int


def read_entries(
    names: Sequence[str], defaults: Mapping[str, float], first: Sequence[str], search: bool
) -> tuple[Entry, ...]:
    """Return the entries of a comparison.

    Args:
        names: METHOD, or METHOD@RATE for a fixed rate.
        defaults: the default learning rate of every known method.
        first: METHOD=RATE, the first rate of a search in place of the default.
        search: whether rates are searched; else every method has its first rate alone.

    Raises:
        UserError: for an unknown method and for a rate that is no positive number.
    """
    if not names:
        raise UserError("--methods names no method; name at least one, such as lift")
    starts = dict(defaults)
    for text in first:
        method, _, number = text.partition("=")
        _known(method, defaults, f"--rates {text}")
        starts[method] = _rate(number, f"--rates {text}")
    entries, seen = [], Counter[str]()
    for name in names:
        method, at, number = name.partition("@")
        _known(method, defaults, f"--methods {name}")
        rate = _rate(number, f"--methods {name}") if at else starts[method]
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name} ({seen[name]})"
        entries.append(Entry(label, method, rate, bool(at) or not search, SEEDS_APART * (seen[name] - 1)))
    return tuple(entries)


def _known(method: str, methods: Collection[str], option: str) -> None:
    if method not in methods:
        raise UserError(f"{option} has the unknown method {method!r}; use one of {', '.join(methods)}")


def _rate(text: str, option: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"{option} has the learning rate {text!r}; give a positive number, such as 3e-4")
    return rate


def final_rate(entry: Entry, rows: Sequence[Row]) -> float:
    """Return the rate of an entry's final runs.

    Raises:
        UserError: if every rate of its search diverged.
    """
    return entry.rate if entry.fixed else best_rate(tried(rows, entry.label))


def next_trial(design: Design, rows: Sequence[Row], failed: Collection[str] = ()) -> Trial | None:
    """Return the run that comes next, or None at the end.

    The searches take turns, and so do the methods of each seed of the final stage. So what a budget
    leaves is complete for all methods up to some point.

    Args:
        design: what the comparison runs.
        rows: its finished runs.
        failed: labels of entries that cannot run.
    """
    done = {(row.stage, row.method, row.rate, row.seed) for row in rows}
    if not any(row.stage == "base" for row in rows):
        return Trial("base", None, 0.0, 0)
    entries = [entry for entry in design.entries if entry.label not in failed]
    for seed in range(PILOT_SEEDS):
        for entry in _piloted(design, entries):
            if ("pilot", entry.label, entry.rate, seed) not in done:
                return Trial("pilot", entry, entry.rate, seed)
    searches = {entry: tried(rows, entry.label) for entry in entries if not entry.fixed}
    wanted = [(len(t), e, next_rate(t, e.rate, design.most_rates)) for e, t in searches.items()]
    for _, entry, rate in sorted(wanted, key=lambda item: item[0]):
        if rate is not None:
            return Trial("rates", entry, rate, 0)
    for seed in range(design.seeds):
        for entry in entries:
            if not entry.fixed and _all_diverged(searches[entry]):
                continue
            rate = final_rate(entry, rows)
            if ("final", entry.label, rate, seed) not in done:
                return Trial("final", entry, rate, seed)
    return None


def known(trial: Trial, rows: Sequence[Row]) -> Row | None:
    """Return the row of a run that is already known from another stage, or None.

    A search may have tried the rate of the pilot before the method became one of the first two.
    """
    if trial.stage != "pilot" or trial.seed != 0:
        return None
    same = (row for row in rows if (row.stage, row.method, row.rate) == ("rates", trial.label, trial.rate))
    return next((replace(row, stage="pilot") for row in same), None)


def _piloted(design: Design, entries: Sequence[Entry]) -> Sequence[Entry]:
    """The methods of the pilot, out of those that can run: none without the reference."""
    return entries[:PILOT_METHODS] if design.entries[0] in entries else ()


def _all_diverged(losses: Mapping[float, float]) -> bool:
    return not any(map(math.isfinite, losses.values()))


def remaining(design: Design, rows: Sequence[Row], failed: Collection[str], most: bool) -> Counter[tuple[str, str]]:
    """Return how many runs remain at least or at most, by stage and label.

    At least, the best rate of a search is the first one or the best so far, or the next one where
    all have diverged. At most, every search tries as many rates as it may.

    Args:
        design: what the comparison runs.
        rows: its finished runs.
        failed: labels of entries that cannot run.
        most: whether to count at most.
    """
    entries = [entry for entry in design.entries if entry.label not in failed]
    left: Counter[tuple[str, str]] = Counter()
    left["base", BASE] = int(not any(row.stage == "base" for row in rows))
    piloted = _piloted(design, entries)
    for entry in piloted:
        seeds = {row.seed for row in rows if row.stage == "pilot" and row.method == entry.label}
        if known(Trial("pilot", entry, entry.rate, 0), rows) is not None:
            seeds.add(0)
        left["pilot", entry.label] = PILOT_SEEDS - len(seeds)
    for entry in entries:
        found = tried(rows, entry.label)
        if not entry.fixed:
            left["rates", entry.label] = _rates_left(design, entry, found, most, entry in piloted)
        finals = sum(row.stage == "final" and row.method == entry.label for row in rows)
        hopeless = not entry.fixed and not left["rates", entry.label] and _all_diverged(found)
        left["final", entry.label] = 0 if hopeless else max(0, design.seeds - finals)
    return +left


def _rates_left(design: Design, entry: Entry, found: dict[float, float], most: bool, piloted: bool) -> int:
    """Runs that a search still needs, beside those of the pilot."""
    losses = dict(found)
    while (rate := next_rate(losses, entry.rate, design.most_rates)) is not None:
        losses[rate] = 0.0 if _all_diverged(losses) else math.inf  # a rate that is no better ends the search soonest
    whole = design.most_rates if most and len(losses) > len(found) else len(losses)
    return whole - len(found) - int(piloted and not found)
