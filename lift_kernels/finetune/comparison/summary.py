"""What the rows of a task say of each method, and of each against the reference method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from . import rates, statistics
from .rows import Row
from .statistics import Design, Estimate, SeedPart

WINS, TIE, LOSES = "wins", "tie", "loses"
CALLED = 0.05
"""A difference is called a win or a loss where Holm's p-value is below this."""
FIGURES = {"target": "target_losses", "neutral": "neutral_losses"}


@dataclass(frozen=True)
class Difference:
    """A figure of a method minus that of the reference, over the seeds and samples of both."""

    estimate: Estimate
    p: float
    """Holm's adjusted p-value among the losses of all methods; NaN of accuracies, not tested."""

    @property
    def outcome(self) -> str:
        """How the method does against the reference: "wins" with a lower loss, "tie", "loses"."""
        if not self.p < CALLED:
            return TIE
        return WINS if self.estimate.mean < 0 else LOSES


@dataclass(frozen=True)
class Method:
    """A method's final runs on the test part. Losses are in nats per token."""

    name: str
    rate: float
    seeds: tuple[int, ...]
    diverged: int
    """Final runs that diverged. If there are any, the estimates below are None."""
    entries: int
    seconds: float
    """Mean of the final runs' seconds."""
    target: Estimate | None
    gain: Estimate | None
    """Loss of the untrained model minus the method's."""
    forgetting: Estimate | None
    """Loss of neutral text minus that of the untrained model; None where it was not measured."""
    accuracy: Estimate | None
    """None where no questions were asked."""
    unfinished: str | None
    """Why the best rate may lie outside of those tried; None where it does not."""
    target_difference: Difference | None = None
    forgetting_difference: Difference | None = None
    accuracy_difference: Difference | None = None


@dataclass(frozen=True)
class Summary:
    """All methods of a task, by their loss; those that diverged come last."""

    task: str
    reference: str
    methods: tuple[Method, ...]
    base: Row
    """The untrained model on the test part."""
    pilot_seeds: int
    """Seeds of the pilot; 0 without a pilot."""
    missing: dict[str, str]
    """Methods that have a search for a rate but no final run, and why."""

    def method(self, name: str) -> Method:
        """Return the method of this name."""
        return next(method for method in self.methods if method.name == name)

    @property
    def others(self) -> tuple[Method, ...]:
        """All methods but the reference."""
        return tuple(method for method in self.methods if method.name != self.reference)


def tried(rows: Sequence[Row], method: str) -> dict[float, float]:
    """Return the validation loss by rate of a method's search, in the order of the rows.

    The loss is infinite where training diverged.
    """
    found = (r for r in rows if (r.stage, r.part, r.method) == ("rates", "validation", method))
    return {row.rate: row.target_loss for row in found}


def base_row(rows: Sequence[Row], part: str) -> Row:
    """Return the row of the untrained model on a part.

    Raises:
        UserError: if there is none.
    """
    for row in rows:
        if row.stage == "base" and row.part == part:
            return row
    raise UserError(f"the untrained model has no row for the {part} part; run the comparison again: it goes on")


def planned(rows: Sequence[Row], reference: str, seeds: int, samples: int) -> Design | None:
    """Return what a design can find, from the rows of the pilot; None without one of two methods.

    Args:
        rows: rows of one task.
        reference: the first method of the pilot.
        seeds: seeds of each method in the comparison.
        samples: test samples, at least two.
    """
    pilot = _pilot(rows, reference)
    if len(pilot) < 2:
        return None
    first, second = (_losses(runs, "target") for runs in pilot)
    gained = float(np.mean(base_row(rows, "validation").target_losses) - first.mean())
    return statistics.smallest_difference(second - first, gained, seeds, samples)


def summarize(rows: Sequence[Row], reference: str = "lift") -> Summary:
    """Return what the final runs of one task say.

    Args:
        rows: all rows of one task.
        reference: the method that every other one is compared with.

    Raises:
        UserError: if runs are missing or do not fit together.
    """
    finals: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.seed):
        if (row.stage, row.part) == ("final", "test"):
            finals.setdefault(row.method, []).append(row)
    if reference not in finals:
        there = ", ".join(finals) or "none"
        raise UserError(f"there is no final run of {reference} (there are runs of: {there}); name another reference")
    base, pilot = base_row(rows, "test"), _pilot(rows, reference)
    runs, pairs = ({figure: part(pilot, figure) for figure in FIGURES} for part in (_part_of_run, _part_of_pair))
    target, neutral, accuracy = _differences(finals, reference, pairs)
    methods = [
        dataclasses.replace(
            _method(own, base, runs, tried(rows, name)),
            target_difference=target.get(name),
            forgetting_difference=neutral.get(name),
            accuracy_difference=accuracy.get(name),
        )
        for name, own in finals.items()
    ]
    ordered = sorted(methods, key=lambda m: (m.target is None, m.target.mean if m.target else 0))
    seeds = len(pilot[0]) if pilot else 0
    return Summary(base.task, reference, tuple(ordered), base, seeds, _missing(rows, finals))


def _missing(rows: Sequence[Row], finals: Container[str]) -> dict[str, str]:
    names = dict.fromkeys(row.method for row in rows if row.stage == "rates" and row.method not in finals)
    diverged = {name: math.isinf(min(tried(rows, name).values(), default=0.0)) for name in names}
    return {name: "every rate diverged" if diverged[name] else "it has not been trained yet" for name in names}


def _pilot(rows: Sequence[Row], reference: str) -> list[list[Row]]:
    """The runs of the reference in the pilot, by seed, and those of another method.

    There is no other method where none has all seeds of the reference, and none at all where the
    reference has fewer than two.
    """
    found: dict[str, list[Row]] = {reference: []}
    for row in sorted(rows, key=lambda r: r.seed):
        if (row.stage, row.part, row.status) == ("pilot", "validation", "ok"):
            found.setdefault(row.method, []).append(row)
    for method, runs in found.items():
        if len({row.rate for row in runs}) > 1:
            raise UserError(f"the runs of {method} in the pilot differ in their rate; delete the rows of one")
    seeds = [row.seed for row in found[reference]]
    return [runs for runs in found.values() if [row.seed for row in runs] == seeds][:2] if len(seeds) > 1 else []


def _losses(rows: Sequence[Row], figure: str) -> np.ndarray:
    """Losses of runs, (runs, samples)."""
    losses = [getattr(row, FIGURES[figure]) for row in rows]
    counts = {len(values) for values in losses}
    if len(counts) > 1:
        raise UserError(
            f"runs of {rows[0].task} have {' and '.join(map(str, sorted(counts)))} samples; delete one sort"
        )
    if counts == {1}:
        raise UserError(f"{rows[0].task} has one sample of {figure} loss, which gives no interval; take more samples")
    return np.array(losses)


def _part_of_run(pilot: Sequence[Sequence[Row]], figure: str) -> SeedPart | None:
    """What the seed contributes to the loss of a run."""
    if not pilot or not getattr(pilot[0][0], FIGURES[figure]):
        return None
    return statistics.seed_part(_losses(pilot[0], figure))


def _part_of_pair(pilot: Sequence[Sequence[Row]], figure: str) -> SeedPart | None:
    """What the seed contributes to the difference of two methods."""
    if len(pilot) < 2 or not getattr(pilot[0][0], FIGURES[figure]):
        return None
    first, second = (_losses(runs, figure) for runs in pilot)
    return statistics.seed_part(second - first)


def _method(own: Sequence[Row], base: Row, parts: dict[str, SeedPart | None], search: dict[float, float]) -> Method:
    first, diverged = own[0], sum(row.status == "diverged" for row in own)
    if len({row.rate for row in own}) > 1:
        names = " and ".join(sorted({f"{row.rate:g}" for row in own}))
        raise UserError(f"final runs of {first.method} have the rates {names}; delete the rows of one")
    target = gain = forgetting = accuracy = None
    if not diverged:
        losses = _losses([base, *own], "target")
        target = statistics.estimate(losses[1:], parts["target"])
        gain = statistics.estimate(losses[0] - losses[1:], parts["target"])
        if base.neutral_losses:
            neutral = _losses([base, *own], "neutral")
            forgetting = statistics.estimate(neutral[1:] - neutral[0], parts["neutral"])
        if all(row.correct for row in own):
            accuracy = statistics.accuracy(_correct(own))
    return Method(
        name=first.method,
        rate=first.rate,
        seeds=tuple(row.seed for row in own),
        diverged=diverged,
        entries=first.entries,
        seconds=sum(row.seconds for row in own) / len(own),
        target=target,
        gain=gain,
        forgetting=forgetting,
        accuracy=accuracy,
        unfinished=rates.unfinished(search) if search else None,
    )


def _correct(rows: Sequence[Row]) -> np.ndarray:
    answers = [row.correct or () for row in rows]
    if len({len(values) for values in answers}) > 1:
        raise UserError(f"runs of {rows[0].task} have answers to different questions; delete those of one sort")
    return np.array(answers)


def _differences(
    finals: dict[str, list[Row]], reference: str, parts: dict[str, SeedPart | None]
) -> list[dict[str, Difference]]:
    """The methods minus the reference in target loss, neutral loss and accuracy, by name.

    Both losses are one family of comparisons, so that Holm's correction holds for all that is said
    of them. Accuracies come second to the losses, and are not tested.
    """
    found = {
        figure: _estimates(finals, reference, figure, parts.get(figure)) for figure in ("target", "neutral", "accuracy")
    }
    p = {(figure, name): e.p for figure in FIGURES for name, e in found[figure].items()}
    adjusted = statistics.holm(p)
    return [
        {name: Difference(e, adjusted.get((figure, name), math.nan)) for name, e in estimates.items()}
        for figure, estimates in found.items()
    ]


def _estimates(finals: dict[str, list[Row]], reference: str, figure: str, part: SeedPart | None) -> dict[str, Estimate]:
    """The methods minus the reference in one figure, where both have it."""
    estimates: dict[str, Estimate] = {}
    for name, own in finals.items():
        first, second = _common(own, finals[reference])
        if name == reference or any(row.status == "diverged" for row in [*own, *finals[reference]]):
            continue
        if figure == "accuracy":
            if all(row.correct for row in [*first, *second]):
                both = _correct([*first, *second])
                estimates[name] = statistics.accuracy_difference(both[: len(first)], both[len(first) :])
        elif getattr(first[0], FIGURES[figure]):
            both = _losses([*first, *second], figure)
            d = both[: len(first)] - both[len(first) :]
            estimates[name] = statistics.estimate(d, part)
    return estimates


def _common(own: Sequence[Row], reference: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The runs of two methods with the seeds that both have."""
    seeds = {row.seed for row in own} & {row.seed for row in reference}
    if not seeds:
        raise UserError(
            f"final runs of {own[0].method} and {reference[0].method} have no seed in common; run both with the same"
        )
    return [row for row in own if row.seed in seeds], [row for row in reference if row.seed in seeds]
