"""Rows of a comparison whose losses are made up."""

from __future__ import annotations

from lift_kernels.finetune.comparison.rows import Row


def make_row(**changes) -> Row:
    """A final run of lift with two samples, some of its fields changed."""
    fields = dict(
        task="sums",
        stage="final",
        method="lift",
        rate=1e-3,
        seed=0,
        part="test",
        target_losses=(1.25, 0.5),
        neutral_losses=(3.0, 3.5, 4.0),
        correct=(0, 1, 0, 1),
        answered=3,
        entries=1234,
        train_seconds=10.25,
        seconds=12.5,
        status="ok",
        machine="2 cores",
        commit="abc1234",
        torch="2.11.0",
        fingerprint="0a",
    )
    return Row(**(fields | changes))
