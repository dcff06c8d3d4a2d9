"""Draws the plots of a results folder from its CSVs.

    python -m bench.plots [FOLDER]     (default: the one whose plots are in the READMEs)

Each plot is made of the CSVs that `FIGURES` names. A row without a figure has no bar. The caption
names the methods that the machine could not run. A bench calls `draw` after it wrote its CSV.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.common import plot_card
from bench.common.plot_labels import OPS, REFRESH, Row, amount, label, origin, percent, times
from bench.common.plot_panels import BLUE, DARK, GREEN, GREY, INK, PALE, PINK, SKY, YELLOW, Bar, Panel, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = Path(__file__).resolve().parent / "results" / "intel-xeon-2-cores-x86-64-v3"
METHODS = {"LIFT": BLUE, "other methods": GREY}
MEMORY = {"gradients": PALE, "moments": BLUE, "master": SKY, "indices": GREEN, "added": YELLOW, "warm_start": PINK}
TRAINING = {"forward_backward_ms": PALE, "step_ms": BLUE, "refresh_ms": YELLOW}
STATE = "LIFT's moments, and master weights of bf16 models, are fp32. bf16 state: bf16 moments, no master weights."
SPEED = "speed, AdamW fused = 1× (logarithmic)"


def colour(text: str) -> str:
    """Blue for this package, dark grey for the baseline, grey for the rest."""
    if text.startswith(("LIFT", *OPS)):
        return BLUE
    return DARK if text in ("AdamW fused", "Full fine-tuning, AdamW fused") else GREY


def done(rows: Iterable[Row]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if row["status"] == "ok"]


def by_set(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each set, in the order of the file."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row["set"], []).append(row)
    return sets


def span(bars: Iterable[Bar]) -> str:
    """The least and the greatest length of the bars, as text."""
    lengths = sorted(bar.length for bar in bars)
    return f"{lengths[0]:.1f} to {lengths[-1]:.1f} times" if lengths else "not known to be"


def speed_bar(row: Row, *more: str) -> Bar:
    """A bar of ``ratio``. Its roofline is the ratio that the row would have there."""
    text, ratio, share = label(row["variant"]), float(row["ratio"]), row["share_of_floor"]
    cells = (times(row["ratio"]), amount(row["median_ms"], "ms"), *more)
    return Bar(text, [(ratio, colour(text))], cells, ratio / float(share) if share else None)


def stacked(row: Row, parts: dict[str, str], *cells: str, roofline: str = "") -> Bar:
    """A bar of the columns ``parts``."""
    lengths = [(float(row[part] or 0), shade) for part, shade in parts.items()]
    return Bar(label(row["variant"]), lengths, cells, float(roofline) if roofline else None)


def sparse_adamw(rows: Sequence[Row]) -> Figure:
    """The step of every set, one row of panels a dtype."""

    def drawn(variant: str) -> bool:
        """Not the forms between fp32 and bf16 state, nor those that the project dropped."""
        left_out = (
            "stochastic",
            "cold",
            "skipping",
            "scattered lines",
            "bf16 moments, fp32 master",
            "bf16 moments + refresh",
        )
        return not any(words in variant for words in left_out)

    sets = by_set(row for row in done(rows) if drawn(row["variant"]))
    grid = []
    for dtype in dict.fromkeys(name.rpartition(", ")[2] for name in sets):
        chosen = {name: [speed_bar(row) for row in sets[name]] for name in sets if name.endswith(dtype)}
        grid.append([Panel(label(name), SPEED, ("speed", "time"), bars, True) for name, bars in align(chosen).items()])
    lift = [bar for line in grid for panel in line for bar in panel.bars if bar.parts and bar.label.startswith("LIFT")]
    without, refreshed = ([bar for bar in lift if bar.label.endswith(REFRESH) == ends] for ends in (False, True))
    title = f"LIFT's optimizer step is {span(without)} as fast as AdamW fused"
    title += f", {span(refreshed)} with refreshes" if refreshed else ""
    remark = "LIFT trains 5 % of the entries. + refresh: with 1/100 of a refresh of all masks (real weights only)."
    vector = "Packed AdamW: AdamW fused on one vector of the selected entries, and a scatter into the weights."
    remarks = [remark, STATE, *([vector] if any(row["variant"].startswith("packed vector") for row in rows) else [])]
    return figure(title, grid, origin(rows, *remarks), METHODS)


def align(sets: dict[str, list[Bar]]) -> dict[str, list[Bar]]:
    """The same labels in every set. Dashes stand where a set lacks one."""
    labels = dict.fromkeys(bar.label for bars in sets.values() for bar in bars)
    found = {name: {bar.label: bar for bar in bars} for name, bars in sets.items()}
    return {name: [found[name].get(text, Bar(text, [], ("–", "–"))) for text in labels] for name in sets}


def baselines(rows: Sequence[Row]) -> Figure:
    """The step beside other optimizers, with the bytes of their state."""
    close = ("AdamW for-loop", "bitsandbytes AdamW")  # to AdamW foreach; the CSV has them
    heads, grid = ("speed", "time", "state per parameter", "of roofline"), []
    for name, chosen in by_set(row for row in done(rows) if row["variant"] not in close).items():
        bars = [speed_bar(row, amount(row["state_bytes"], "bytes"), percent(row["share_of_floor"])) for row in chosen]
        bars.sort(key=lambda bar: -bar.length)
        grid.append([Panel(label(name), SPEED, heads, bars, speeds=True)])
    lift = [bar for line in grid for bar in line[0].bars if bar.label.startswith("LIFT")]
    title = f"LIFT's optimizer step is {span(lift)} as fast as AdamW fused"
    remark = "One matrix. LIFT and SHiRA train 5 % of its entries. Not drawn: AdamW for-loop, bitsandbytes AdamW."
    return figure(title, grid, origin(rows, remark, STATE), METHODS)


def packed_ops(rows: Sequence[Row]) -> Figure:
    """The ops on packed values. The plain PyTorch version of each is the rule at 1."""
    plain = {(row["set"], row["variant"]): row["median_ms"] for row in done(rows) if row["variant"] == row["baseline"]}
    heads, grid = ("speed", "time", "PyTorch", "of roofline"), []
    for name, chosen in by_set(row for row in done(rows) if row["variant"] != row["baseline"]).items():
        more = [(amount(plain[name, row["baseline"]], "ms"), percent(row["share_of_floor"])) for row in chosen]
        bars = [speed_bar(row, *cells) for row, cells in zip(chosen, more)]
        grid.append([Panel(label(name), "speed, plain PyTorch = 1× (logarithmic)", heads, bars, speeds=True)])
    title = f"Ops on packed values are {span(bar for line in grid for bar in line[0].bars)} as fast as plain PyTorch"
    return figure(title, grid, origin(rows, "One matrix, 5 % of its entries selected."))


def delta(rows: Sequence[Row]) -> Figure:
    """Sizes of the files, and below them times beside those of the whole model."""
    sizes, spent = [], []
    for name, chosen in by_set(done(rows)).items():
        bars = [size_bar(row) for row in chosen if row["file_bytes"]]
        sizes.append(Panel(f"{label(name)}: size of the file", "MiB", ("size",), bars))
        bars = [time_bar(row) for row in chosen if row["median_ms"]]
        spent.append(Panel(f"{label(name)}: time", "ms", ("time", "speed", "of roofline"), bars))
    shares = sorted(panel.bars[-1].length / panel.bars[0].length for panel in sizes if len(panel.bars) == 2)
    least, most = (percent(shares[end]) if shares else "an unknown share" for end in (0, -1))
    title = f"A delta file has {least} to {most} of the bytes of its model"
    remark = "Speed: of saving a delta, against saving the whole model; of the rest, against loading the whole model."
    return figure(title, [sizes, spent], origin(rows, remark), {"delta": BLUE, "whole model": DARK})


def of_delta(row: Row) -> str:
    """Blue for what is done to a delta."""
    return DARK if row["variant"] == row["baseline"] or "SHA" in row["variant"] else BLUE


def size_bar(row: Row) -> Bar:
    mib = float(row["file_bytes"]) / 2**20
    text = "Delta file" if row["variant"] == "save_delta" else "Whole model"
    return Bar(text, [(mib, of_delta(row))], (amount(mib, "MiB"),))


def time_bar(row: Row) -> Bar:
    cells = (amount(row["median_ms"], "ms"), times(row["ratio"]), percent(row["share_of_floor"]))
    return Bar(label(row["variant"]), [(float(row["median_ms"]), of_delta(row))], cells, float(row["floor_ms"]))


def memory(rows: Sequence[Row]) -> Figure:
    """What each method keeps beside the weights, stacked by part."""
    end = max(float(row["total"]) for row in done(rows))
    grid = []
    for name, chosen in by_set(done(rows)).items():
        bars = [stacked(row, MEMORY, amount(row["total"], "bytes"), percent(row["share_of_adamw"])) for row in chosen]
        title, heads = f"Weights in {label(name)}", ("total", "of AdamW")
        grid.append([Panel(title, "bytes per parameter beside the weights", heads, bars, end=end)])
    legend = {label(part): shade for part, shade in MEMORY.items()}
    remark = "Of AdamW: share of the total of AdamW fused, with weights of the same dtype."
    return figure("Memory of training beside the weights", grid, origin(rows, remark), legend)


def training(rows: Sequence[Row]) -> Figure:
    """Time of a training step by part, and the peak memory of each method."""
    grid = []
    for name, chosen in by_set(done(rows)).items():
        steps, peaks = [], []
        for row in chosen:
            cells = (amount(row["median_ms"], "ms"), times(row["ratio"]), percent(row["share_of_floor"]))
            steps.append(stacked(row, TRAINING, *cells, roofline=row["floor_ms"]))
            mib, text = row.get("peak_over_model_mib", ""), label(row["variant"])
            peaks.append(Bar(text, [(float(mib), colour(text))] if mib else [], (amount(mib, "MiB"),)))
        heads = ("time", "speed", "of roofline")
        peak = Panel("Peak memory above the model", "MiB", ("peak",), peaks)
        grid.append([Panel(label(name), "time of a training step, ms", heads, steps), peak])
    legend = {label(part): shade for part, shade in TRAINING.items()}
    remark = "Speed: median of the ratios to full fine-tuning within a round; it need not follow the median times."
    return figure("Time and peak memory of a training step", grid, origin(rows, remark), legend)


HEADLINE = {
    "AdamW fused": "AdamW fused",
    "bitsandbytes AdamW8bit": "bitsandbytes AdamW8bit",
    "GaLore, r = 64": "GaLore, r = 64",
    "LoRA (peft), AdamW fused": "",
    "LIFT, matrix mode": "sparse_adamw_, dense grads",
    "LIFT, packed mode": "sparse_adamw_, packed grads",
}  # the methods in memory.csv, and in peers.csv


def headline(sizes: Sequence[Row], steps: Sequence[Row]) -> Figure:
    """Bytes per parameter and the speed of the step, in fp32."""
    kept = {row["variant"]: row for row in done(sizes) if row["set"] == "fp32"}
    timed = {row["variant"]: row for row in done(steps) if row["set"].endswith("float32")}
    left = [size_of(kept[name]) for name in HEADLINE if name in kept]
    right = [speed_of(timed[name]) for name in HEADLINE.values() if name in timed]
    title = f"LIFT with packed gradients: {left[-1].cells[0]} per parameter beside the weights"
    title += f", a step {right[-1].cells[0]} as fast as AdamW's"
    panels = [
        Panel("Memory beside the weights, fp32", "bytes per parameter", ("total",), left),
        Panel("Speed of the optimizer step, fp32", "AdamW fused = 1×", ("speed",), right, rule=1.0),
    ]
    place = label(next(iter(timed.values()))["set"].rpartition(", ")[0])
    absent = ", ".join(bar.label for bar in left if bar.label not in {other.label for other in right})
    legend = {"gradients": PALE, "AdamW fused, the baseline": DARK, **METHODS}
    remarks = (
        "Memory: gradients in pale grey; optimizer state, mask indices and added weights in the method's colour.",
        f"Speed: one {place} matrix, without refreshes of masks and projections. Not timed there: {absent}.",
    )
    return figure(title, [panels], origin([*kept.values()], *remarks), legend, shared=False)


def size_of(row: Row) -> Bar:
    """Gradients, and the rest in the colour of the method."""
    text, gradients = label(row["variant"]), float(row["gradients"])
    parts = [(gradients, PALE), (float(row["total"]) - gradients, colour(text))]
    return Bar(text, parts, (amount(row["total"], "bytes"),))


def speed_of(row: Row) -> Bar:
    text = label(row["variant"])
    return Bar(text, [(float(row["ratio"]), colour(text))], (times(row["ratio"]),))


def masks(rows: Sequence[Row]) -> Figure:
    """How the overlap with the exact mask grows with the passes over a matrix."""
    from matplotlib.figure import Figure

    result = Figure((7, 4.9), dpi=120, layout="constrained")
    axis = result.subplots()
    for name, chosen in by_set(done(rows)).items():
        for variant in dict.fromkeys(row["variant"] for row in chosen):
            points = [(float(r["passes"]), float(r["overlap_mean"])) for r in chosen if r["variant"] == variant]
            axis.plot(*zip(*points), marker="o", markersize=3, label=f"{label(name)}: {label(variant)}")
    axis.set_xlabel("passes over the matrix")
    axis.set_ylabel("mean overlap with the exact mask")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    result.supxlabel(origin(rows), x=0.01, ha="left", fontsize=7, color=INK)
    return result


FIGURES: dict[str, tuple[Callable[..., Figure | None], tuple[str, ...]]] = {
    "headline": (headline, ("memory", "peers")),
    "sparse_adamw": (sparse_adamw, ("sparse_adamw",)),
    "peers": (baselines, ("peers",)),
    "packed_ops": (packed_ops, ("packed_ops",)),
    "delta": (delta, ("delta",)),
    "memory": (memory, ("memory",)),
    "training": (training, ("training",)),
    "masks": (masks, ("masks_by_passes",)),
    "gpu_step": (plot_card.step, ("gpu_time",)),
    "gpu_training": (plot_card.training, ("gpu_time",)),
}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def one_environment(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first one's environment. Those measured again with other settings follow."""
    return [row for row in rows if row.get("environment", "") == rows[0].get("environment", "")]


def make(name: str, folder: Path) -> Figure | None:
    """The figure, or None where the folder has no figures for it."""
    drawn, files = FIGURES[name]
    paths = [folder / f"{file}.csv" for file in files]
    tables = [one_environment(read(path)) for path in paths if path.exists()]
    return drawn(*tables) if len(tables) == len(paths) and all(map(done, tables)) else None


def draw(name: str, folder: Path) -> None:
    """Write ``name``.png into the folder that has its CSVs."""
    if (found := make(name, folder)) is None:
        print(f"no figures for {name}.png")
        return
    found.savefig(folder / f"{name}.png")
    print(f"wrote {folder / f'{name}.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the plots of a results folder from its CSVs.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help="default: %(default)s")
    folder = parser.parse_args(argv).folder
    for name in FIGURES:
        draw(name, folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
