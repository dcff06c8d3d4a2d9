"""A comparison as a table, in text or Markdown, and its outcome in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .statistics import Design, Estimate
from .summary import CALLED, LOSES, TIE, WINS, Difference, Method, Summary

WORDS = {
    "loss": {LOSES: "wins against", TIE: "ties with", WINS: "loses to"},
    "forgetting": {LOSES: "forgets less than", TIE: "ties with", WINS: "forgets more than"},
}
"""What the reference does on a figure, by the outcome of the other method."""


def decimals(summary: Summary) -> int:
    """Return the decimals of losses that show two digits of the smallest standard error."""
    errors = [m.target.error for m in summary.methods if m.target]
    errors += [m.target_difference.estimate.error for m in summary.others if m.target_difference]
    smallest = min((error for error in errors if error > 0), default=1e-3)
    return min(5, max(3, 1 - math.floor(math.log10(smallest))))


def _header(summary: Summary) -> list[str]:
    reference = summary.reference
    return [
        "method",
        "rate",
        "test loss",
        "gain over base",
        f"minus {reference}'s",
        f"against {reference}",
        "forgetting",
        f"against {reference}'s",
        "accuracy",
        "entries trained",
        "s a run",
    ]


def _with_interval(estimate: Estimate | None, form: str) -> str:
    """A mean and half of its interval, which is symmetric."""
    if estimate is None:
        return "-"
    return f"{estimate.mean:{form}} ± {estimate.high - estimate.mean:{form.replace('+', '')}}"


def _accuracy(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:.1%} ({100 * estimate.low:.1f}..{100 * estimate.high:.1f})"


def _cells(method: Method, summary: Summary, digits: int) -> list[str]:
    loss, signed = f".{digits}f", f"+.{digits}f"
    if method.name == summary.reference:
        outcomes = ["reference", "reference"]
    else:
        differences = (method.target_difference, method.forgetting_difference)
        outcomes = [difference.outcome if difference else "-" for difference in differences]
    difference = method.target_difference
    return [
        method.name,
        f"{method.rate:g}" + ("*" if method.unfinished else ""),
        _diverged(method) if method.diverged else _with_interval(method.target, loss),
        _with_interval(method.gain, signed),
        _with_interval(difference.estimate if difference else None, signed),
        outcomes[0],
        _with_interval(method.forgetting, signed),
        outcomes[1],
        _accuracy(method.accuracy),
        f"{method.entries:,}",
        f"{method.seconds:.0f}",
    ]


def _diverged(method: Method) -> str:
    return f"diverged with {method.diverged} of {_count(len(method.seeds), 'seed')}"


def _table(summary: Summary) -> list[list[str]]:
    digits = decimals(summary)
    return [_header(summary), *(_cells(method, summary, digits) for method in summary.methods)]


def text_table(summary: Summary) -> str:
    """Return the table as aligned text, the lowest loss first.

    Losses are in nats per token, with half of a 95 % interval. A star after a rate says that the
    search for it ended before the best rate was inside.
    """
    rows = _table(summary)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def caption(summary: Summary, model: str) -> str:
    """Return what a table is of, and its units."""
    return (
        f"{model}, {summary.task}. Losses are in nats per token, with half of a 95 % interval. Wins and losses are "
        "those of the method in the row. A star after a rate: the search ended before the best rate was inside."
    )


def markdown_table(summary: Summary) -> str:
    """Return the table of `text_table` in Markdown."""
    header, *rows = _table(summary)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in row)} |" for row in lines)


def words(summary: Summary, not_looked_at: Sequence[str] = (), design: Design | None = None) -> str:
    """Return the verdict: who wins, ties and loses, what it rests on, and what it leaves out.

    Args:
        summary: the comparison.
        not_looked_at: what the comparison did not vary, such as "other models".
        design: what was planned from a pilot before the runs.
    """
    digits = decimals(summary)
    compared = sum((m.target_difference is not None) + (m.forgetting_difference is not None) for m in summary.others)
    gain = summary.method(summary.reference).gain
    gained = gain.mean if gain else 0.0
    target = _section(summary, "Target loss", "loss", lambda m: m.target_difference, compared, digits, gained)
    forgetting = _section(summary, "Forgetting", "forgetting", lambda m: m.forgetting_difference, compared, digits)
    paragraphs = [_basis(summary, design, compared, digits), target, forgetting, _accuracies(summary), *_notes(summary)]
    if not_looked_at:
        paragraphs.append(f"Not looked at: {', '.join(not_looked_at)}.")
    return "\n".join(filter(None, paragraphs))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _basis(summary: Summary, design: Design | None, compared: int, digits: int) -> str:
    base, reference = summary.base, summary.method(summary.reference)
    text = f"{summary.task}: {_count(len(reference.seeds), 'seed')}, {_count(len(base.target_losses), 'test sample')}"
    if base.neutral_losses:
        text += f", {_count(len(base.neutral_losses), 'piece')} of neutral text"
    text += ". Losses are means over samples in nats per token, with 95 % intervals."
    if compared:
        text += " A difference that a design finds is called in 80 % of repetitions, as the only comparison."
    if compared > 1:
        text += f" Wins and losses hold after Holm's correction for all {compared} comparisons of losses."
    if design is not None:
        share = "" if math.isnan(design.share) else f" ({design.share:.1%} of what training gained)"
        text += f" The rough figure of the pilot was: target differences from {design.nats:.{digits}f} on{share}."
    return text


def _section(
    summary: Summary,
    title: str,
    figure: str,
    of: Callable[[Method], Difference | None],
    compared: int,
    digits: int,
    gained: float = 0.0,
) -> str:
    """One line that counts, one for each other method, and one on what is found with all of them.

    Nothing where nothing was measured. What can be found is also said as a share of what training
    gained, where it gained something.
    """
    found = [(method.name, difference) for method in summary.others if (difference := of(method))]
    if not found:
        return ""
    reference = summary.reference
    head = (
        f"{title}: {reference} {outcomes(found, figure)}. The other's {figure} minus {reference}'s, with its interval:"
    )
    lines = [f"  {_sentence(name, figure, d, compared, digits, gained)}" for name, d in found]
    return "\n".join([head, *lines, *_found_with_all(found, digits, gained)])


def _found_with_all(found: Sequence[tuple[str, Difference]], digits: int, gained: float) -> list[str]:
    """A line with the difference that every comparison finds, where there are several."""
    if len(found) < 2:
        return []
    name, least = max(found, key=lambda pair: pair[1].estimate.finds)
    return [f"With every method this design finds {_finds(least.estimate, digits, gained)}; only {name} needs as much."]


def _finds(estimate: Estimate, digits: int, gained: float) -> str:
    share = f" ({estimate.finds / gained:.1%} of what training gained)" if gained > 0 else ""
    return f"differences from {estimate.finds:.{digits}f} on{share}"


def outcomes(found: Sequence[tuple[str, Difference]], figure: str) -> str:
    """Return what the reference does against other methods, such as "wins against a, ties with b".

    Args:
        found: other methods and their differences.
        figure: a key of WORDS.
    """
    parts = []
    for outcome, phrase in WORDS[figure].items():
        if names := [name for name, difference in found if difference.outcome == outcome]:
            parts.append(f"{phrase} {', '.join(names)}")
    return ", ".join(parts)


def _sentence(name: str, figure: str, difference: Difference, comparisons: int, digits: int, gained: float) -> str:
    e, form = difference.estimate, f"+.{digits}f"
    text = f"{WORDS[figure][difference.outcome]} {name}: {e.mean:{form}} ({e.low:{form}}..{e.high:{form}})"
    if difference.outcome == TIE:
        text += f"; this design finds {_finds(e, digits, gained)}"
        if e.p < CALLED:
            text += f"; alone it would be called, as one of {comparisons} it is not (Holm's p = {difference.p:.3f})"
    return text


def _accuracies(summary: Summary) -> str:
    found = [(m.name, m.accuracy_difference.estimate) for m in summary.others if m.accuracy_difference]
    if not found:
        return ""
    parts = (f"{name} {100 * e.mean:+.1f} ({100 * e.low:+.1f}..{100 * e.high:+.1f})" for name, e in found)
    return f"Accuracy minus {summary.reference}'s, in points, without a correction: {', '.join(parts)}."


def _notes(summary: Summary) -> list[str]:
    notes = [f"{m.name} {_diverged(m)} and is not compared." for m in summary.methods if m.diverged]
    notes += [f"{name} has no final run: {reason}." for name, reason in summary.missing.items()]
    notes += [
        f"The rate of {m.name} may not be its best: the search ended at its limit, and {m.unfinished}."
        for m in summary.methods
        if m.unfinished
    ]
    if fell := [m.name for m in summary.methods if m.forgetting and m.forgetting.high < 0]:
        notes.append(
            f"Nothing was forgotten with {', '.join(fell)}: the loss of neutral text fell. There, to forget more means "
            "that it fell less."
        )
    wanted = len(summary.method(summary.reference).seeds)
    notes += [
        f"{m.name} has {_count(len(m.seeds), 'seed')} and {summary.reference} {wanted}; common seeds are compared."
        for m in summary.others
        if len(m.seeds) != wanted
    ]
    parts = {m.target_difference.estimate.seed_part for m in summary.others if m.target_difference}
    if any(m.target_difference.estimate.seeds == 2 for m in summary.others if m.target_difference):
        notes.append("Intervals of two seeds may cover the truth in 88 % instead of 95 %. Take 3 seeds or more.")
    if "pilot" in parts:
        notes.append(
            "One seed says little. What other seeds would change was taken from a pilot of "
            f"{summary.pilot_seeds} seeds, as if all methods depended on their seed as much. Take 3 seeds or more."
        )
    if "unknown" in parts:
        notes.append(
            "One seed says little. The intervals hold for these very runs: another seed may turn a win into a loss, "
            "and how often is unknown. Take 3 seeds or more."
        )
    return notes
