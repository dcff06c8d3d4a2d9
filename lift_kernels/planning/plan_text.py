"""A plan of memory as text."""

from __future__ import annotations

import math

from .forms import UNBUILT
from .plan import CONTEXT, GIB, USABLE, FormPlan, MemoryPlan, usable

_COLUMNS = ("weights", "values", "indices", "gradients", "moments", "masters", "bases", "scratch")
_FORMULA = """\
Counted on a model without numbers, not measured; scratch is an estimate. Of a step,
  total = weights + values + indices + moments + masters + bases
          + max(activations and gradients, dense gradients + scratch of new masks),
  activations and gradients = max(top, bottom) of the backward pass, each a + b x layers.
Gradients come while activations go, so a total is less than the sum of its row. With
checkpointing a layer keeps its input alone, and one layer at a time is computed again."""


def text_of(plan: MemoryPlan) -> str:
    """Return a plan as a table, what fits, the command to run, and how it was computed."""
    gpus = "a GPU" if plan.gpus == 1 else f"each of {plan.gpus} GPUs"
    lines = [
        f"{plan.model}: {plan.parameters:,} weights in {plan.dtype}; LIFT trains {plan.entries:,} entries",
        f"{plan.batch} x {plan.seq} tokens in a pass on {gpus}; all numbers in GiB of a GPU",
        "",
        *_table(plan),
        "",
        *_outcome(plan),
        _FORMULA,
    ]
    return "\n".join(lines)


def _table(plan: MemoryPlan) -> list[str]:
    head = ("form", *_COLUMNS, "activations", "total", "checkpointed: activations", "total", "fits")
    rows = [head, *(_cells(row) for row in plan.rows)]
    if plan.gpu_memory is None:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:])) for row in rows
    ]


def _cells(row: FormPlan) -> tuple[str, ...]:
    parts = [gib(getattr(row, column)) for column in _COLUMNS]
    saved = [gib(row.checkpointed), gib(row.total_checkpointed)]
    return (row.form, *parts, gib(row.activations), gib(row.total), *saved, row.fits)


def gib(count: int | None) -> str:
    """Return bytes in GiB, and "-" for none."""
    return f"{count / GIB:.2f}" if count else "-"


def _outcome(plan: MemoryPlan) -> list[str]:
    """Return what fits, and what runs it."""
    best = plan.best
    if best is None:
        return []
    if plan.gpu_memory is None:
        return [f"to run {best.form}: {best.command}", ""]
    how = " with checkpointing" if best.fits == "with checkpointing" else ""
    why = "of LIFT's forms that fit the one nearest to the default"
    if not best.lift:
        least = min((row for row in plan.rows if row.lift and row.runs), key=lambda row: row.least)
        why = f"no form of LIFT fits at these numbers: {least.form} takes {gib(least.least)} GiB, the least"
    return [
        f"{gib(usable(plan.gpu_memory))} GiB of {gib(plan.gpu_memory)} may be filled; the rest is for CUDA and gaps",
        f"{best.form} fits{how} ({why}); to run it:",
        f"  {best.command}",
        "",
    ]


def refusal(plan: MemoryPlan) -> str | None:
    """Return a line for a model that does not fit, with what comes nearest; None where one does."""
    if plan.gpu_memory is None or plan.best is not None:
        return None
    near = plan.smallest
    how = " with checkpointing" if near.total_checkpointed == near.least else ""
    other = next((row for row in plan.rows if row.fits not in ("", "no")), None)
    would = f"; {other.form}, would fit, and {UNBUILT}" if other else ""
    return (
        f"{plan.model} does not fit into {gib(plan.gpu_memory)} GiB, of which a plan fills "
        f"{gib(usable(plan.gpu_memory))}; the nearest form is {near.form}{how}, {gib(near.least)} GiB, for a GPU of "
        f"{gpu_for(near.least)} GiB or more{would}"
    )


def gpu_for(count: int) -> int:
    """Return the least whole GiB of a GPU into which so many bytes fit."""
    return math.ceil((count + CONTEXT) / USABLE / GIB)
