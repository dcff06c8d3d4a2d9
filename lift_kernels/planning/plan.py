"""plan_memory: what each form of training takes, what fits, and what runs it."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import UserError
from ..masks.budget import DEFAULT_RANK
from .commands import Run, command_of
from .conversions import Kind
from .counted_pass import PassBytes, count_pass
from .forms import FORMS, SHARDED, Form
from .model_shapes import ModelShapes, model_shapes
from .totals import Total, total_of

CONTEXT = 10**9
"""Bytes that CUDA and its libraries take on a GPU, about."""
USABLE = 0.92
"""The share of a GPU that a plan may fill. The rest is lost between the allocator's blocks."""
GIB = 2**30
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class FormPlan:
    """The bytes that a form of training takes on each GPU.

    Attributes:
        form: its name.
        lift: whether LIFT chooses the entries.
        weights: of the model, with its buffers.
        values: packed values or adapters.
        indices: index lists.
        gradients: all of them, after a backward pass.
        moments, masters, bases: of the optimizer's state.
        scratch: largest scratch of new masks, their index lists among it; layers that a sharded
            form gathers; buffers of averaged gradients and of offloaded state. It is an estimate.
        activations: the most that activations take, with logits and loss.
        checkpointed: that with checkpointing; None where the model has none.
        total: the peak of a whole step. Activations go while gradients come, and masks are made
            when activations are gone, so it is less than the sum.
        total_checkpointed: that with checkpointing.
        host: bytes in host memory.
        fits: "yes", "with checkpointing" or "no"; "" where no size of a GPU was given.
        runs: whether it can be run today.
        command: what runs it; where nothing does, why.
    """

    form: str
    lift: bool
    weights: int
    values: int
    indices: int
    gradients: int
    moments: int
    masters: int
    bases: int
    scratch: int
    activations: int
    checkpointed: int | None
    total: int
    total_checkpointed: int | None
    host: int
    fits: str
    runs: bool
    command: str

    @property
    def least(self) -> int:
        """The smaller total."""
        return self.total if self.total_checkpointed is None else min(self.total, self.total_checkpointed)


@dataclass(frozen=True)
class MemoryPlan:
    """What `plan_memory` returns; as text it is a table.

    Attributes:
        model: what the user called it.
        parameters: its weights.
        entries: those that LIFT trains.
        dtype: of the weights.
        batch, seq: sequences of a pass on each GPU, and their tokens.
        accumulation: passes of a step.
        gpus: how many GPUs.
        gpu_memory: bytes of each, or None.
        rows: the forms.
    """

    model: str
    parameters: int
    entries: int
    dtype: str
    batch: int
    seq: int
    accumulation: int
    gpus: int
    gpu_memory: int | None
    rows: tuple[FormPlan, ...]

    @property
    def best(self) -> FormPlan | None:
        """The first form of LIFT that fits and can be run, or else the first other one, or None."""
        fitting = [row for row in self.rows if row.runs and row.fits != "no"]
        return next((row for row in fitting if row.lift), next(iter(fitting), None))

    @property
    def smallest(self) -> FormPlan:
        """The form that can be run and takes least."""
        return min((row for row in self.rows if row.runs), key=lambda row: row.least)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, in bytes."""
        return asdict(self)

    def __str__(self) -> str:
        from .plan_text import text_of

        return text_of(self)


def bytes_of(text: str | int) -> int:
    """Return the bytes of a size such as 24GiB or 80GB.

    Raises:
        UserError: for another text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", str(text).strip())
    if isinstance(text, int) and text > 0:
        return text
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise UserError(f"{text} is no size of memory; give a number with a unit, such as 24GiB or 80GB")
    return int(float(found[1]) * _UNITS[found[2]])


def usable(gpu_memory: int) -> int:
    """Return the bytes of a GPU that tensors may fill."""
    return int(USABLE * gpu_memory) - CONTEXT


def plan_memory(
    model: Any,
    *,
    gpu_memory: str | int | None = None,
    gpus: int = 1,
    seq: int = 2048,
    batch: int = 1,
    accumulation: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    density: float = 0.05,
    budget_rank: int | None = None,
    rank: int = DEFAULT_RANK,
    warm_start: str | None = None,
    device: str = "cuda",
) -> MemoryPlan:
    """Plan the memory of fine-tuning from a model's configuration alone.

    The peak of each form is counted: model and loss run on tensors without numbers
    (`lift_kernels.planning.counted_pass` has the formula). What is kept from step to step follows
    from the number of trained entries.

    Args:
        model: a folder with config.json, a GGUF file, a hub id, or a configuration of transformers.
        gpu_memory: of each GPU, as bytes or as a text such as "24GiB"; None says nothing of what
            fits.
        gpus: how many GPUs share a batch. With more than one there are rows of sharded forms.
        seq, batch: tokens of a sequence, and sequences of a pass on each GPU.
        accumulation: passes of a step.
        dtype: of the weights.
        density, budget_rank, rank: as in `LiftAdamW`.
        warm_start: where bases are kept: "device", "cpu" or None. ``finetune`` keeps none.
        device: "cuda", or "cpu" for the scratch of training on a CPU.

    Returns:
        The rows of all forms.

    Raises:
        UserError: for a model that cannot be read or run, and for numbers out of range.
    """
    for name, value in {"gpus": gpus, "seq": seq, "batch": batch, "accumulation": accumulation}.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if warm_start not in ("device", "cpu", None):
        raise UserError(f"warm_start is {warm_start!r}; it must be 'device', 'cpu' or None")
    memory = None if gpu_memory is None else bytes_of(gpu_memory)
    shapes = model_shapes(model, dtype=dtype, density=density, budget_rank=budget_rank, rank=rank)
    budget: dict[str, Any] = {"density": density} if budget_rank is None else {"budget_rank": budget_rank}
    masks = {k: v for k, v in (budget | {"rank": rank}).items() if v != {"density": 0.05, "rank": DEFAULT_RANK}.get(k)}
    name = str(dtype).removeprefix("torch.")
    run = Run(shapes.name, name, batch, seq, accumulation, gpus, masks, warm_start)

    @functools.cache
    def counted(kind: Kind, checkpointing: bool) -> PassBytes | None:
        options: dict[str, Any] = {"passes": accumulation, "device": device, "checkpointing": checkpointing}
        return _count_if_possible(shapes, kind, batch=batch, seq=seq, **options)

    def total(form: Form, checkpointing: bool) -> Total | None:
        found = counted(form.kind, checkpointing)
        if found is None:
            return None
        return total_of(form, shapes, found, gpus=gpus, warm_start=warm_start, device=device, gpu_memory=memory)

    rows = [
        _row(form, plain, total(form, True), run, memory)
        for form in (*FORMS, *(SHARDED if gpus > 1 else ()))
        if (form.master != "split" or dtype == torch.bfloat16) and (plain := total(form, False)) is not None
    ]
    return MemoryPlan(
        shapes.name, shapes.parameters, shapes.entries, name, batch, seq, accumulation, gpus, memory, tuple(rows)
    )


def _count_if_possible(shapes: ModelShapes, kind: Kind, **options: Any) -> PassBytes | None:
    """Count a pass; None where peft is missing or a model has no checkpointing.

    Raises:
        UserError: for a model that cannot be run at all.
    """
    try:
        return count_pass(shapes, kind, **options)
    except UserError:
        if kind in ("lora", "shira") or options["checkpointing"]:
            return None
        raise


def _row(form: Form, plain: Total, saving: Total | None, run: Run, memory: int | None) -> FormPlan:
    """Return the row of a form, from its totals without and with checkpointing."""
    fits = ""
    if memory is not None:
        most = usable(memory)
        fits = "yes" if plain.peak <= most else "with checkpointing" if saving and saving.peak <= most else "no"
    return FormPlan(
        form=form.name,
        lift=form.lift,
        weights=plain.weights,
        **vars(plain.kept),
        gradients=plain.gradients,
        scratch=plain.scratch,
        activations=plain.activations,
        checkpointed=None if saving is None else saving.activations,
        total=plain.peak,
        total_checkpointed=None if saving is None else saving.peak,
        fits=fits,
        runs=not form.sharded,
        command=command_of(form, run, fits == "with checkpointing"),
    )
