"""Draws panels of horizontal bars: labels to the left, numbers in columns to the right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart, and greys.
BLUE, SKY, GREEN, YELLOW, PINK, ORANGE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00"
GREY, DARK, PALE, INK = "#9C9C9C", "#5C5C5C", "#DADADA", "#505050"
ROOFLINE = "roofline: limit set by the measured bandwidth or product rate"


@dataclass(frozen=True)
class Bar:
    """A labelled bar of stacked (length, colour) parts, its numbers and its roofline."""

    label: str
    parts: Sequence[tuple[float, str]]
    cells: Sequence[str]
    roofline: float | None = None

    @property
    def length(self) -> float:
        return sum(length for length, _ in self.parts)


@dataclass(frozen=True)
class Panel:
    """Bars under a title, and what the horizontal axis and the columns of numbers say.

    ``speeds``: bars start at the baseline, 1, and the axis is logarithmic. ``rule``: a line in a
    panel that is not. ``end``: where the axis ends at least.
    """

    title: str
    quantity: str
    heads: Sequence[str]
    bars: Sequence[Bar]
    speeds: bool = False
    rule: float | None = None
    end: float = 0.0


def figure(
    title: str, grid: Sequence[Sequence[Panel]], caption: str, legend: dict[str, str] | None = None, shared: bool = True
) -> Figure:
    """Rows of panels between a title with a legend and a caption.

    ``shared``: with one column of labels.
    """
    from matplotlib.figure import Figure

    counts = [max(len(panel.bars) for panel in row) for row in grid]
    above, below = 0.8 if legend else 0.75, 0.2 + 0.15 * (caption.count("\n") + 1)
    height = 0.25 * sum(counts) + 0.95 * len(grid) + above + below
    result = Figure((12.4, height), dpi=110, layout="constrained")
    rect = (0, below / height, 1, 1 - (above + below) / height)
    result.get_layout_engine().set(w_pad=0.08, h_pad=0.07, rect=rect)
    axes = result.subplots(len(grid), len(grid[0]), height_ratios=[count + 0.4 for count in counts], squeeze=False)
    for column, panels in enumerate(zip(*grid)):
        widths = column_widths(panels)
        for line, panel in enumerate(panels):
            draw_panel(axes[line, column], panel, widths, labels=column == 0 or not shared)
            if panel.quantity in [below.quantity for below in panels[line + 1 :]]:
                axes[line, column].set_xlabel("")
    marked = any(bar.roofline is not None for row in grid for panel in row for bar in panel.bars)
    result.text(0.01, 1 - 0.12 / height, title, va="top", fontsize=13, fontweight="bold")
    result.text(0.01, 0.08 / height, caption, va="bottom", fontsize=8, color=INK, linespacing=1.35)
    add_legend(result, legend or {}, marked, 1 - 0.38 / height)
    return result


def add_legend(result: Figure, colours: dict[str, str], marked: bool, top: float) -> None:
    """One line of colours, and of the roofline's mark, below the title."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(color=shade, label=text) for text, shade in colours.items()]
    if marked:
        mark = Line2D([], [], color=ORANGE, linestyle="", marker="|", markersize=11, markeredgewidth=2, label=ROOFLINE)
        handles.append(mark)
    if handles:
        options = {"frameon": False, "fontsize": 9, "columnspacing": 1.5, "handlelength": 1.2, "borderpad": 0}
        found = result.legend(
            handles=handles, ncols=len(handles), loc="upper left", bbox_to_anchor=(0.007, top), **options
        )
        found.set_in_layout(False)


def column_widths(panels: Sequence[Panel]) -> list[float]:
    """Points of each column of numbers, the same in panels that stand below each other."""
    lines = [cells for panel in panels for cells in [panel.heads, *(bar.cells for bar in panel.bars)]]
    return [12 + 5.3 * max(map(len, column)) for column in itertools.zip_longest(*lines, fillvalue="")]


def draw_panel(axis: Axes, panel: Panel, widths: Sequence[float], labels: bool) -> None:
    """Bars from the top down, with their rooflines and numbers."""
    for place, bar in enumerate(panel.bars):
        left = 0.0
        for length, shade in bar.parts:
            start, width = (1.0, length - 1.0) if panel.speeds else (left, length)
            axis.barh(place, width, left=start, height=0.7, color=shade)
            left += length
        if bar.roofline is not None:
            axis.plot([bar.roofline] * 2, [place - 0.42, place + 0.42], color=ORANGE, linewidth=2)
    write_columns(axis, panel, widths)
    axis.set_ylim(len(panel.bars) - 0.5, -0.6)
    axis.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars] if labels else [""] * len(panel.bars))
    axis.tick_params(labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=20)
    axis.set_xlabel(panel.quantity, fontsize=9)
    set_scale(axis, panel)


def write_columns(axis: Axes, panel: Panel, widths: Sequence[float]) -> None:
    """The numbers and their heads, right-aligned beside the axes."""
    lines = [(-0.95, panel.heads, INK), *((place, bar.cells, "black") for place, bar in enumerate(panel.bars))]
    for place, cells, shade in lines:
        for cell, offset in zip(cells, itertools.accumulate(widths)):
            at = {"xycoords": axis.get_yaxis_transform(), "xytext": (offset, 0), "textcoords": "offset points"}
            style = {"ha": "right", "va": "center_baseline", "fontsize": 9, "color": shade}
            axis.annotate(cell, (1, place), annotation_clip=False, **at, **style)


def set_scale(axis: Axes, panel: Panel) -> None:
    """The horizontal axis: from 0, or for speeds by powers of two around a rule at 1."""
    ends = [panel.end, *(bar.length for bar in panel.bars if bar.parts)]
    ends += [bar.roofline for bar in panel.bars if bar.roofline is not None]
    if panel.speeds or panel.rule is not None:
        axis.axvline(1 if panel.speeds else panel.rule, color="black", linewidth=1.2)
    if panel.speeds:
        speed_scale(axis, [end for end in ends if end > 0])
    else:
        axis.set_xlim(0, 1.04 * (max(ends) or 1))
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def speed_scale(axis: Axes, ends: Sequence[float]) -> None:
    """Powers of two from below the slowest to above the fastest, at most about seven of them."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(0.8, *ends) / 1.15, max(1.25, *ends) * 1.15)
    low, high = (math.log2(end) for end in axis.get_xlim())
    every = 1 if high - low < 5 else 2
    powers = [power for power in range(-20, 21) if low <= power <= high and power % every == 0]
    axis.set_xticks([2.0**p for p in powers], [f"{2**p}×" if p >= 0 else f"1/{2**-p}×" for p in powers])
    axis.minorticks_off()
