"""Options with which a training fits into a memory, from the model's configuration alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..planning.conversions import Kind
from ..planning.counted_pass import count_pass
from ..planning.forms import FINETUNE_OPTIONS, FORMS, Form
from ..planning.model_shapes import ModelShapes, model_shapes, read_config
from ..planning.plan import GIB, bytes_of, usable
from ..planning.totals import total_of
from .config import ADAPTERS, DTYPES, SPARSE, Settings
from .data import SHOTS
from .model_io import find_model
from .model_kinds import check_kind

FACTORED = ("lift", "off_principal", "blocks", "runs")
"""Methods whose masks are made from factors, which take memory at a refresh."""


@dataclass(frozen=True)
class _Choice:
    """Options that fit or do not, and the peak of a step with them."""

    settings: Settings
    form: Form
    peak: int

    def __str__(self) -> str:
        own = self.settings
        passes = f"{own.accumulation} passes a step" if own.accumulation > 1 else "one pass a step"
        kept = "checkpointing" if own.checkpointing else "no checkpointing"
        return f"{own.dtype}, {kept}, {passes}" + "".join(f", {n} {getattr(self.form, n)}" for n in self.form.options)


def fitted(settings: Settings, given: Collection[str], memory: str) -> tuple[Settings, str]:
    """Choose options with which a step fits, and return them with a line that says what and why.

    What changes no result is tried first: more passes a step, then checkpointing, which takes a
    third longer. Then come smaller forms of state, and bfloat16 weights last. The longest sequences
    are assumed, of ``max_length`` tokens, all of them with labels. Measuring the model is not
    counted.

    Args:
        settings: options of the run.
        given: names of the options that the user gave, which are kept.
        memory: a size such as "24GiB".

    Raises:
        UserError: for a model that cannot be read or run, for a size that is none, and where
            nothing fits.
    """
    whole = bytes_of(memory)
    config, name = _config(settings)
    device = "cuda" if settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available()) else "cpu"
    most = usable(whole) if device == "cuda" else whole
    first = nearest = None
    for choice in _choices(settings, given, config, device, whole):
        first, nearest = first or choice, min(nearest or choice, choice, key=lambda c: c.peak)
        if choice.peak <= most:
            line = f"fit: {choice}: at most {_gib(choice.peak)} of {_gib(most)} GiB, computed"
            if choice is not first:
                line += f"; with {first} it would take {_gib(first.peak)} GiB"
            return choice.settings, line
    assert nearest is not None
    raise UserError(
        f"{name} does not fit into {_gib(whole)} GiB, of which training may fill {_gib(most)}; the nearest is "
        f"{nearest}, {_gib(nearest.peak)} GiB; lower --max-length, --batch-size or --density, leave out options "
        "that you gave, or see `python -m lift_kernels plan`"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def _config(settings: Settings) -> tuple[Any, str]:
    """Return the configuration of a run's model, and what the model is called."""
    source = find_model(settings.model)
    config = read_config(str(Path(source.location) / source.gguf_file) if source.gguf_file else source.location)
    if not source.gguf_file:
        check_kind(config, source.description)
    return config, settings.model or source.gguf_file or source.location


def _choices(settings: Settings, given: Collection[str], config: Any, device: str, memory: int) -> Iterator[_Choice]:
    """Yield choices with their peaks, in the order in which they are tried."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    each = _samples_of_sequence(settings)
    rows = settings.batch_size // each
    dtypes = [settings.dtype] if "dtype" in given or settings.autocast else [settings.dtype, "bfloat16"]
    accumulations = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n >= ranks]
    if "accumulation" in given or not accumulations:
        accumulations = [settings.accumulation]
    forms = [f for f in FORMS if f.kind == _kind(settings) and f.finetune and not set(f.options) & set(given)]
    own = {name: getattr(settings, name) for name in FINETUNE_OPTIONS & set(given)}
    own = {name: None if value == "none" else value for name, value in own.items()}
    forms = [replace(form, **own) for form in forms] if settings.method in SPARSE else forms
    for dtype in dict.fromkeys(dtypes):
        shapes = _shapes(settings, config, dtype)
        for form in (f for f in forms if f.master != "split" or dtype == "bfloat16"):
            for checkpointing in [settings.checkpointing] if "checkpointing" in given else [False, True]:
                for n in accumulations:
                    own = {name: getattr(form, name) for name in form.options}
                    chosen = replace(settings, dtype=dtype, checkpointing=checkpointing, accumulation=n, **own)
                    try:
                        peak = _peak(chosen, form, shapes, -(-rows // n // ranks), each, ranks, device, memory)
                    except UserError:
                        if checkpointing and not settings.checkpointing:
                            continue  # a model that has none
                        raise
                    yield _Choice(chosen, form, peak)


def _samples_of_sequence(settings: Settings) -> int:
    """Return the most samples that a sequence joins (`sequences.training_sequences`)."""
    shots = settings.shots if settings.shots is not None else 0 if settings.packing else SHOTS
    return max(n for n in range(1, max(1, shots) + 1) if settings.batch_size % n == 0)


def _kind(settings: Settings) -> Kind:
    if settings.method in SPARSE:
        return "packed" if settings.gradients == "packed" else "dense"
    return settings.method  # type: ignore[return-value]


def _shapes(settings: Settings, config: Any, dtype: str) -> ModelShapes:
    masks: dict[str, Any] = {}
    if settings.method in (*SPARSE, *ADAPTERS):
        masks = {"include": settings.include, "exclude": settings.exclude, "extra": settings.extra}
    return model_shapes(
        config,
        dtype=DTYPES[dtype],
        density=settings.density,
        budget_rank=settings.budget_rank,
        rank=settings.rank,
        **masks,
    )


def _peak(
    settings: Settings,
    form: Form,
    shapes: ModelShapes,
    rows: int,
    each: int,
    ranks: int,
    device: str,
    memory: int,
) -> int:
    """Return the peak of a step of one rank, with ``rows`` sequences of ``each`` samples a pass."""
    counted = count_pass(
        shapes,
        form.kind,
        batch=rows,
        seq=each * settings.max_length,
        checkpointing=settings.checkpointing,
        passes=settings.accumulation,
        padded=not settings.packing,
        autocast=settings.autocast,
        device=device,
    )
    refreshes = settings.method in FACTORED
    options: dict[str, Any] = {"gpus": ranks, "refreshes": refreshes, "device": device, "gpu_memory": memory}
    return total_of(form, shapes, counted, **options).peak
