"""Short comparisons on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lift_kernels.finetune.comparison import rows
from lift_kernels.finetune.comparison.options import ROWS, Comparison, from_command

TWO = ("lift@5e-3", "full@1e-3")
"""Two methods at fixed rates: one row of the base for each part, two pilots of each, and finals."""


def make_options(tiny, output, **changes) -> Comparison:
    base = {"model": str(tiny), "output": str(output), "device": "cpu", "steps": 5, "batch_size": 2, "rank": 4}
    base |= {"density": 0.2, "validation": 3, "test": 5, "pieces": 4, "seeds": 1, "methods": TWO}
    return from_command(base | changes)


def arguments(tiny, output, *further: str) -> list[str]:
    """The command line of `make_options`."""
    text = f"compare --model {tiny} --output {output} --device cpu --steps 5 --batch-size 2 --rank 4 --density 0.2"
    text += f" --validation 3 --test 5 --pieces 4 --seeds 1 --methods {' '.join(TWO)}"
    return [*text.split(), *further]


def results(output) -> list[rows.Row]:
    """The rows of a comparison without what may differ between runs: the seconds."""
    found = rows.read(Path(output) / ROWS)
    return [replace(row, train_seconds=0.0, seconds=0.0) for row in found]


def make_row(stage: str, method: str, rate: float, seed: int, loss: float | None, part: str = "validation") -> rows.Row:
    """A row of a run; it diverged where the loss is None."""
    losses = () if loss is None else (loss, loss)
    return rows.Row(
        task="task",
        stage=stage,
        method=method,
        rate=rate,
        seed=seed,
        part=part,
        target_losses=losses,
        neutral_losses=losses,
        correct=None,
        answered=None,
        entries=1,
        train_seconds=1.0,
        seconds=2.0,
        status="diverged" if loss is None else "ok",
        machine="a machine",
        commit="a commit",
        torch="a version",
        fingerprint="a fingerprint",
    )
