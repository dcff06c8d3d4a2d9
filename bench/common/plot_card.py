"""The plots of a card: the step and a training step, from the rows of gpu_time.csv."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bench.common.plot_labels import Row, amount, label, number, origin, percent, times
from bench.common.plot_panels import BLUE, DARK, GREY, PALE, YELLOW, Bar, Panel, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"LIFT": BLUE, "baseline": DARK, "other methods": GREY}
MEMORY = {"optimizer state": YELLOW, "the rest of the peak": PALE}


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a time."""
    return [row for row in rows if row["status"] == "ok" and row.get("median_ms")]


def is_ours(row: Row) -> bool:
    return row["variant"].startswith(("LIFT", "dense ", "packed "))


def name(row: Row) -> str:
    """The label of a bar. The step's own variants are named by their gradients alone."""
    text = label(row["variant"])
    return f"LIFT, {text}" if is_ours(row) and not text.startswith("LIFT") else text


def colour(row: Row) -> str:
    """Blue for this package, dark grey for what others are compared with, grey for the rest."""
    return BLUE if is_ours(row) else GREY if row.get("baseline") else DARK


def legend(rows: Iterable[Row]) -> dict[str, str]:
    shades = {colour(row) for row in rows}
    return {text: shade for text, shade in METHODS.items() if shade in shades}


def compared(rows: Iterable[Row]) -> str:
    """How many times as fast as the first of its baselines this package is."""
    ours = [row for row in rows if is_ours(row) and row.get("ratio")]
    if not ours:
        return ""
    against = ours[0]["baseline"]
    ratios = sorted(float(row["ratio"]) for row in ours if row["baseline"] == against)
    ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1]))
    return f": {' to '.join(ends)} times as fast as {label(against)}"


def speeds(rows: Sequence[Row]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Heads and cells of the speed by variant. The baseline is named where there are several."""
    several = len({row["baseline"] for row in rows if row.get("baseline")}) > 1
    cells = {}
    for row in rows:
        against = (label(row.get("baseline", "")) or "–",) if several else ()
        cells[row["variant"]] = (times(row.get("ratio", "")), *against, percent(row.get("share_of_floor", "")))
    return ["speed", *(["against"] if several else []), "of roofline"], cells


def step(rows: Sequence[Row]) -> Figure | None:
    """Time of the step on all matrices of LLaMA-2-7B in bf16, dense baselines beside it.

    None where nothing of it was timed.
    """
    chosen = [r for r in rows if r["stage"].startswith("step LLaMA-2-7B") and r.get("dtype") == "bf16"]
    if not (found := timed(chosen)):
        return None
    heads, cells = speeds(found)
    bars = []
    for row in found:
        parts = [(float(row["median_ms"]), colour(row))]
        floor = float(row["floor_ms"]) if row.get("floor_ms") else None
        bars.append(Bar(name(row), parts, (amount(row["median_ms"], "ms"), *cells[row["variant"]]), floor))
    title = label(f"{found[0]['model']}, bf16, {found[0]['shape']}")
    panel = Panel(title, "time on the card, ms", ("time", *heads), bars)
    remark = "LIFT trains 5 % of the entries. Its variants are named by gradients, moments and master weights."
    return figure(f"LIFT's optimizer step on a card{compared(found)}", [[panel]], origin(chosen, remark), legend(found))


def training(rows: Sequence[Row]) -> Figure | None:
    """Tokens a second and peak memory of training by each method, or None.

    Those of the larger model, if that was timed.
    """
    methods = [row for row in rows if row["variant"] != "(whole stage)"]
    by_size = ([row for row in methods if row["stage"] == stage] for stage in ("training 7B", "training"))
    chosen = next((rows for rows in by_size if timed(rows)), [])
    if not (found := timed(chosen)):
        return None
    heads, cells = speeds(found)
    rates, peaks = [], []
    for row in found:
        rate, share = float(row["tokens_per_s"]), row.get("share_of_floor", "")
        limit = rate / float(share) if share else None
        rates.append(Bar(name(row), [(rate, colour(row))], (number(rate), *cells[row["variant"]]), limit))
        peak, state = row.get("peak_gb", ""), row.get("state_gb", "")
        held = float(state or 0)
        parts = [(held, YELLOW), (float(peak) - held, PALE)] if peak else []
        peaks.append(Bar(name(row), parts, (amount(peak, "GB"), amount(state, "GB"))))
    title = label(f"{found[0]['model']}, {found[0]['dtype']}, {found[0]['shape']}")
    panels = [
        Panel(title, "tokens per second", ("tokens/s", *heads), rates),
        Panel("Peak memory of a step, model included", "GB", ("peak", "state"), peaks),
    ]
    head = f"Training with LIFT on a card{compared(found)}"
    shades = legend(found) | (MEMORY if any(bar.parts for bar in peaks) else {})
    return figure(head, [panels], origin(chosen, "The steps have no refresh of masks."), shades)
