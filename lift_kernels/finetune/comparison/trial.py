"""One run of a comparison: a fresh copy of the untrained model, trained and measured."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ...errors import UserError
from .. import origin
from ..data import RunData
from ..measure import measure
from ..methods import prepare, trained_entries
from ..metrics import Metric, choose_metric, extract_number
from ..parallel import Ranks
from ..precision import autocast
from ..prompts import Example
from ..timing import Clock
from ..trainer import Diverged
from ..training import train
from .material import FRONTIER_PIECES, Material
from .options import of_run
from .plan import Trial
from .rows import Row


class CannotRun(Exception):
    """A method cannot run on this model or this machine; the message says why."""


@dataclass(frozen=True)
class Measured:
    """What was measured of a model on one part of the data."""

    target: tuple[float, ...] = ()
    neutral: tuple[float, ...] = ()
    correct: tuple[int, ...] | None = None
    answered: int | None = None


def run_trial(shared: Material, trial: Trial) -> list[Row]:
    """Run a trial and return its rows: one for each part of the data that was measured.

    The result depends on the trial alone, not on what ran before.

    Raises:
        CannotRun: where the method does not fit the model, or the memory does not suffice.
    """
    began = time.perf_counter()
    silence = io.StringIO()
    try:
        with redirect_stdout(silence), redirect_stderr(silence):
            rows = _base(shared, trial) if trial.entry is None else _trained(shared, trial)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CannotRun("the memory does not suffice; lower --batch-size or --max-length") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how the CPU's allocator says it
            raise
        raise CannotRun("the memory does not suffice; lower --batch-size or --max-length") from error
    finally:
        gc.collect()
        if shared.device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - began
    return [replace(row, seconds=seconds) for row in rows]


def _base(shared: Material, trial: Trial) -> list[Row]:
    """Measure the untrained model on both parts."""
    transformers.set_seed(shared.options.settings.seed)
    model = copy.deepcopy(shared.model).to(shared.device)
    found = {
        "validation": _measure(shared, model, shared.train, shared.neutral[:FRONTIER_PIECES], scored=False),
        "test": _measure(shared, model, shared.test, shared.neutral, scored=True),
    }
    return [_row(shared, trial, part, of_part) for part, of_part in found.items()]


def _trained(shared: Material, trial: Trial) -> list[Row]:
    """Train a copy of the model, and measure it on the part of the data that the stage may see.

    A run of the pilot with seed 0 is a try of its rate, too, and has a row of both stages.
    """
    assert trial.entry is not None
    final = trial.stage == "final"
    part = "test" if final else "validation"
    settings = of_run(shared.options, trial.entry.method, trial.rate, trial.entry.first_seed + trial.seed)
    transformers.set_seed(settings.seed)
    model = copy.deepcopy(shared.model).to(shared.device)
    clock = Clock(shared.device)
    try:
        ready = prepare(model, shared.tokenizer, settings, shared.train, clock, None)
    except (UserError, ValueError, ModuleNotFoundError) as error:
        raise CannotRun(" ".join(str(error).split())) from error
    entries = trained_entries(ready.optimizer)
    began = clock.now()
    finite = _train(shared, ready.model, ready.optimizer, settings, clock)
    seconds = clock.now() - began
    found = Measured()
    if finite:
        found = _measure(
            shared, ready.model, shared.part(part), shared.neutral[: None if final else FRONTIER_PIECES], scored=final
        )
    row = _row(shared, trial, part, found, entries, seconds)
    first = trial.stage == "pilot" and trial.seed == 0 and not trial.entry.fixed
    return [row, replace(row, stage="rates")] if first else [row]


def _train(shared: Material, model: Any, optimizer: Any, settings: Any, clock: Clock) -> bool:
    """Train a model; return whether it has finite losses and weights."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                model,
                shared.tokenizer,
                optimizer,
                shared.train,
                shared.steps,
                settings,
                clock=clock,
                ranks=Ranks(),
                folder=Path(folder),
            )
        except Diverged:
            return False
        except UserError as error:
            raise CannotRun(str(error)) from error
        except ValueError:  # No mask can be chosen from weights that are not finite.
            if _finite(model):
                raise
            return False
    return _finite(model)


def _finite(model: Any) -> bool:
    return all(bool(p.detach().isfinite().all()) for p in model.parameters())


def _measure(shared: Material, model: Any, data: RunData, neutral: Sequence[Example], *, scored: bool) -> Measured:
    """Measure losses, and answers where there is a metric and they are ``scored``."""
    data = data if scored else replace(data, metric="none")
    with autocast(shared.options.settings, shared.device):
        found = measure(model, shared.tokenizer, data, neutral, Ranks(), "")
    target, other = tuple(found.target), tuple(found.neutral)
    if data.metric == "none":
        return Measured(target, other)
    metric = choose_metric(data.heldout, data.metric, shared.tokenizer)
    correct = tuple(int(metric.right(a, s.answer)) for a, s in zip(found.answers, data.heldout, strict=True))
    return Measured(target, other, correct, sum(_has_form(metric, answer) for answer in found.answers))


def _has_form(metric: Metric, answer: str) -> bool:
    """Return whether an answer has the form that the metric looks for."""
    return extract_number(answer) is not None if metric.name == "number" else bool(answer.strip())


def _row(
    shared: Material, trial: Trial, part: str, found: Measured, entries: int = 0, train_seconds: float = 0.0
) -> Row:
    losses = torch.tensor([*found.target, *found.neutral])
    ok = bool(found.target) and bool(losses.isfinite().all())
    return Row(
        task=shared.options.task,
        stage=trial.stage,
        method=trial.label,
        rate=trial.rate,
        seed=trial.seed,
        part=part,
        target_losses=found.target if ok else (),
        neutral_losses=found.neutral if ok else (),
        correct=found.correct if ok else None,
        answered=found.answered if ok else None,
        entries=entries,
        train_seconds=train_seconds,
        seconds=0.0,
        status="ok" if ok else "diverged",
        machine=origin.machine(shared.device),
        commit=origin.commit(),
        torch=torch.__version__,
        fingerprint=shared.fingerprint,
    )
