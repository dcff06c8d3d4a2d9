"""The table of a probe: the losses with noise, made of the rows of ``mask --probe``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from bench.tables.types import Table, TableError

COLUMNS = ("entries", "noise", "seed", "loss", "tokens", "density", "rank", "machine", "torch", "commit")


def probe(path: Path) -> str:
    """The table of a file: mean and range over the seeds, and where its rows come from.

    Raises:
        TableError: for a file that is missing or holds something else.
    """
    if not path.is_file():
        raise TableError(f"{path} is missing; run mask --probe, or take the table out of the README")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(COLUMNS) <= rows[0].keys() or rows[0]["entries"] != "none":
        raise TableError(f"{path} is no CSV of mask --probe")
    base, *trials = rows
    sizes = sorted({row["noise"] for row in trials}, key=float)
    seeds = len({row["seed"] for row in trials})
    lines = [["noise on", *(f"{float(size):g} sd" for size in sizes)], ["---"] * (1 + len(sizes))]
    for group in dict.fromkeys(row["entries"] for row in trials):
        found = [[float(r["loss"]) for r in trials if (r["entries"], r["noise"]) == (group, size)] for size in sizes]
        lines.append([f"{group} entries", *map(_cell, found)])
    text = f"Without noise the loss is {float(base['loss']):.3f}, on {int(base['tokens']):,} tokens. "
    text += f"Rank {base['rank']}, {100 * float(base['density']):g} % of each matrix"
    text += f"; mean and range of {seeds} draws of the noise." if seeds > 1 else "; one draw of the noise."
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{table}\n\n*{base['machine']}; torch {base['torch']}; commit {base['commit']}*\n"


def _cell(losses: Sequence[float]) -> str:
    """Mean of losses, and their range where there are several."""
    mean = f"{sum(losses) / len(losses):.2f}"
    return mean if len(losses) == 1 else f"{mean} ({min(losses):.2f} to {max(losses):.2f})"


PROBE_TABLES = {"probe": Table("probe.csv", {}, whole=probe)}
