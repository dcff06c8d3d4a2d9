"""Target loss against forgetting, as a picture.

Both are differences from the untrained model on the same samples. So the validation and the test
part can be shown in one picture, and an interval leaves out that some samples are harder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.atomic_file import AtomicFile
from ...errors import UserError
from .rows import Row
from .statistics import Estimate
from .summary import Method, Summary, base_row

_COLORS = (
    "tab:blue tab:orange tab:green tab:red tab:purple tab:brown tab:pink tab:olive tab:cyan goldenrod navy".split()
)
_MARKERS = "s^vDPX<>hp*"
_MARGIN = 0.4
"""How far the picture reaches past the final runs, as a share of their spread."""


def draw(rows: Sequence[Row], summary: Summary, model: str, path: Path) -> None:
    """Write a PNG with each method's final runs, and its search for a rate as a line.

    Low and to the left is good. Points of a line are single runs on the validation part. Runs far
    from the final ones lie outside of the picture.

    Args:
        rows: all rows of the task.
        summary: their summary.
        model: name of the model, for the title.
        path: the file to write; it appears complete or not at all.

    Raises:
        UserError: if no method has both figures.
        FileError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which needs global state and perhaps a display

    shown = [method for method in summary.methods if method.gain and method.forgetting]
    if not shown:
        raise UserError(f"no final run of {summary.task} has a loss of neutral text; there is nothing to draw")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="forgetting: rise of the loss of neutral text (nats per token)",
        ylabel="target loss minus that of the untrained model (nats per token)",
        title=f"{model}, {summary.task}",
    )
    axes.axvline(0, color="0.85", linewidth=1, zorder=0)
    lines = {method.name: _line(rows, method.name) for method in shown}
    styles = _styles(summary)
    entries = [_draw_method(axes, method, lines[method.name], styles[method.name]) for method in shown]
    points = [point for line in lines.values() for point in line]
    axes.set_xlim(_limits([m.forgetting for m in shown], [x for x, _ in points]))
    axes.set_ylim(_limits([_loss(m) for m in shown], [y for _, y in points]))
    seeds = len(summary.method(summary.reference).seeds)
    if points:
        label = "rates tried\n(validation, one seed)"
        entries += axes.plot([], [], "-o", color="0.5", linewidth=0.8, markersize=3, label=label)
    label = f"final runs, 95 % interval\n(test, seeds: {seeds})"
    entries.append(axes.errorbar([], [], xerr=[], yerr=[], fmt="o", color="0.5", label=label))
    figure.legend(handles=entries, loc="outside right upper", frameon=False, title="method (learning rate)")
    with AtomicFile(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _styles(summary: Summary) -> dict[str, tuple[str, str]]:
    """Color and marker by method. The reference is black, and others keep theirs by name."""
    names = sorted(method.name for method in summary.others)
    styles = {name: (_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}
    return styles | {summary.reference: ("black", "o")}


def _line(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Forgetting and loss at each rate that did not diverge, from the lowest rate on."""
    found = [r for r in rows if (r.stage, r.part, r.method, r.status) == ("rates", "validation", name, "ok")]
    if not found:
        return []
    base = base_row(rows, "validation")
    return [
        (r.neutral_loss - base.neutral_loss, r.target_loss - base.target_loss)
        for r in sorted(found, key=lambda r: r.rate)
    ]


def _draw_method(axes: Any, method: Method, line: list[tuple[float, float]], style: tuple[str, str]) -> Any:
    (color, marker), x, y = style, method.forgetting, _loss(method)
    assert x is not None and y is not None  # only such methods are shown
    if line:
        axes.plot(*zip(*line), color=color, marker=marker, linewidth=0.8, markersize=3, alpha=0.6)
    return axes.errorbar(
        [x.mean],
        [y.mean],
        xerr=[[x.mean - x.low], [x.high - x.mean]],
        yerr=[[y.mean - y.low], [y.high - y.mean]],
        fmt=marker,
        color=color,
        markersize=8,
        markeredgecolor="white",
        elinewidth=1.5,
        capsize=3,
        zorder=4 if marker == "o" else 3,
        label=f"{method.name} ({method.rate:g})",
    )


def _loss(method: Method) -> Estimate | None:
    """The final loss minus that of the untrained model."""
    gain = method.gain
    return gain and dataclasses.replace(gain, mean=-gain.mean, low=-gain.high, high=-gain.low)


def _limits(finals: Sequence[Estimate | None], line: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that show all final runs with their intervals, and what lies near them."""
    low, high = min(e.low for e in finals if e), max(e.high for e in finals if e)
    reach = _MARGIN * (high - low) or abs(high) * 0.05 or 1e-3
    near = [x for x in line if low - reach <= x <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low) or reach
    return low - margin, high + margin
