"""A fine-tuning run: load, choose the mask, measure, train, measure, save and report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from ..checkpoint.atomic_file import write_atomic
from ..errors import UserError
from ..optim.lift_adamw import LiftAdamW
from . import report, run_dir, trained
from .config import ADAPTERS, Settings
from .estimate import estimate
from .loading import Loaded, load
from .measure import Measurement, answer_rows, changes, described, fingerprint, measure, read_saved
from .methods import prepare, state_bytes, trained_entries
from .parallel import Ranks, joined
from .precision import autocast
from .timing import Clock, PhaseTimer
from .trained import Kind
from .training import train


@dataclass
class Run(Loaded):
    """What the phases of a run share; `_prepare` and `_save` replace the model where it is wrapped.

    Attributes:
        ranks: the ranks that do the run together.
        folder: directory that the run writes.
        resumed: whether the run in that directory was interrupted before.
        clock: durations of the parts of a training step.
    """

    ranks: Ranks
    folder: Path
    resumed: bool
    clock: Clock


@dataclass(frozen=True)
class Method:
    """The optimizer of a run, and the checkpoint that it continues from.

    Attributes:
        optimizer: optimizer of the trained parameters.
        covered: weights that the method adapts, in whole or in part.
        share: their share of the model's matrices outside embeddings and head.
        kinds: what is trained and what is left out, by kind of layer.
        identity: fingerprints of the frozen weights and the training data (`run_dir.identity`).
        checkpoint: state of the interrupted run, or None at the start.
    """

    optimizer: torch.optim.Optimizer
    covered: list[torch.Tensor]
    share: float
    kinds: list[Kind]
    identity: dict[str, str]
    checkpoint: dict[str, Any] | None


def run(settings: Settings, resumed: bool = False) -> report.Report:
    """Fine-tune a model, write ``<output>/<name>/`` and return the report.

    Args:
        settings: options of the run.
        resumed: continue the interrupted run in that directory; see `run_dir.settings_of`.

    Returns:
        The content of ``report.json``.

    Raises:
        UserError: for input that cannot be used.
    """
    try:
        with joined(settings) as ranks:
            return _run(settings, resumed, ranks)
    except torch.OutOfMemoryError as error:
        smaller = ", or take --dtype bfloat16" if settings.dtype == "float32" else ""
        raise UserError(
            f"the memory of the device does not suffice; lower --batch-size ({settings.batch_size}) or --max-length "
            f"({settings.max_length}){smaller}"
        ) from error


def _run(settings: Settings, resumed: bool, ranks: Ranks) -> report.Report:
    timer = PhaseTimer()
    timer.begin("load", "loading the model")
    loaded = ranks.together(lambda: load(settings, ranks))
    folder, resumed = ranks.first(lambda: run_dir.open_folder(settings, resumed, ranks.restarted))
    job = Run(**vars(loaded), ranks=ranks, folder=folder, resumed=resumed, clock=Clock(loaded.model.device))
    timer.begin("mask", f"preparing method {settings.method}")
    method = _prepare(job)
    timer.begin("estimate", "timing a training batch")
    _say_how_long(job, method)
    timer.begin("before", "measuring the model before training")
    before = _measure_before(job)
    timer.begin("train", f"training {job.steps} steps of {settings.batch_size} samples")
    losses = _train(job, method)
    timer.begin("after", "measuring the model after training")
    after = _measure(job, "after")
    timer.begin("save", f"saving to {job.folder}")
    sizes = _save(job, method)
    timer.begin("end", "done")
    results = _results(job, method, before, after, sizes, timer)
    return ranks.first(lambda: _write_report(job, results, losses, before, after))


def _prepare(job: Run) -> Method:
    """Set up the method with its masks, and find the checkpoint of a resumed run."""
    try:
        ready = prepare(job.model, job.tokenizer, job.settings, job.data, job.clock, job.ranks.group)
    except ValueError as error:  # an option that does not fit this model's matrices, or weights that are not finite
        raise UserError(str(error)) from error
    job.model = ready.model
    print(trained.table(ready.kinds), flush=True)
    identity = run_dir.identity(job.model, job.data.sequences)
    checkpoint = _find_checkpoint(job, identity)
    return Method(ready.optimizer, ready.covered, ready.share, ready.kinds, identity, checkpoint)


def _find_checkpoint(job: Run, identity: dict[str, str]) -> dict[str, Any] | None:
    """Return the checkpoint of a resumed run, or None. Every rank reads it."""
    if not job.resumed:
        return None
    checkpoint = job.ranks.together(lambda: run_dir.find_checkpoint(job.folder, identity, job.ranks.count))
    step = None if checkpoint is None else checkpoint["step"]
    if set(job.ranks.gather(step)) != {step}:
        raise UserError(f"some ranks see another {job.folder}; give --output on a disk that all nodes share")
    if checkpoint is not None:
        print(f"resuming after step {step}", flush=True)
    return checkpoint


def _say_how_long(job: Run, method: Method) -> None:
    """Print how long the rest of the run will take."""
    done = 0 if method.checkpoint is None else method.checkpoint["step"]
    measured = job.ranks.first(lambda: (job.folder / run_dir.BEFORE).exists())
    expected = estimate(
        job.model,
        job.tokenizer,
        job.data,
        job.steps - done,
        job.settings,
        sum(len(example["input_ids"]) for example in job.neutral[1]),
        ranks=job.ranks,
        measurements=1 if measured else 2,
        mask_seconds=job.clock.refreshes.get(0, 0.0),
    )
    print(expected, flush=True)


def _measure_before(job: Run) -> Measurement:
    """Measure the untrained model, or read what the interrupted run measured."""
    path = job.folder / run_dir.BEFORE
    texts = fingerprint(job.data, job.neutral[1])
    earlier = job.ranks.first(lambda: read_saved(path, texts))
    if earlier is not None:
        return Measurement(**earlier)
    measured = _measure(job, "before")
    job.ranks.first(lambda: write_atomic(path, json.dumps({"texts": texts} | measured.saved())))
    return measured


def _measure(job: Run, when: str) -> Measurement:
    with autocast(job.settings, job.model.device):
        return measure(job.model, job.tokenizer, job.data, job.neutral[1], job.ranks, when)


def _train(job: Run, method: Method) -> list[float]:
    """Train up to ``job.steps`` steps and return the loss of every step."""
    return train(
        job.model,
        job.tokenizer,
        method.optimizer,
        job.data,
        job.steps,
        job.settings,
        clock=job.clock,
        ranks=job.ranks,
        folder=job.folder,
        identity=method.identity,
        checkpoint=method.checkpoint,
    )


def _save(job: Run, method: Method) -> dict[str, Any]:
    """Save the model; return the sizes of what was trained, by report key."""
    entries, weights = trained_entries(method.optimizer), sum(p.numel() for p in method.covered)
    state, gradients = state_bytes(method.optimizer), job.clock.gradient_bytes
    lift = isinstance(method.optimizer, LiftAdamW)
    if job.settings.method in ADAPTERS:
        job.model = job.model.merge_and_unload()
    job.ranks.first(lambda: run_dir.save_once(job.model, job.tokenizer, job.folder))
    return {
        "entries": entries,
        "covered_weights": weights,
        "covered_share": method.share,
        "density": entries / weights,
        "trained.by_kind": [kind.row() for kind in method.kinds],
        "optimizer_state_bytes.measured": state,
        "optimizer_state_bytes.dense": 8 * weights,  # two fp32 moments
        "gradient_bytes.measured": gradients,
        "gradient_bytes.dense": sum(p.nbytes for p in method.covered),
        # All that comes on top of the frozen model: index lists, values or masters, moments and
        # gradients.
        "extra_bytes.measured": state + gradients,
        "extra_bytes.an_entry": (state + gradients) / entries if lift else None,
    }


def _results(
    job: Run, method: Method, before: Measurement, after: Measurement, sizes: dict[str, Any], timer: PhaseTimer
) -> report.Report:
    """Assemble the report."""
    clock = job.clock
    return {
        "method": job.settings.method,
        "model.name": job.source.gguf_file or job.source.location,
        "model.description": job.source.description,
        "data.description": job.data.description,
        "data.together": job.data.together,
        **dict(sorted((before.figures | after.figures | changes(before, after)).items())),
        **described(job.data, job.settings.loss, job.neutral, job.tokenizer),
        **sizes,
        **clock.refresh_figures(),
        "seconds.forward_backward": median(clock.forward_backward),
        "seconds.step": median(clock.steps),
        "seconds.refresh": median(clock.refreshes.values()) if clock.refreshes else 0.0,
        "seconds.refreshes": sum(clock.refreshes.values()),
        **{f"seconds.{name}": span for name, span in timer.durations().items()},
        "seconds.total": timer.starts["end"],
        **{f"settings.{key}": value for key, value in run_dir.saved_form(job.settings).items()},
        "ranks": job.ranks.count,
        "settings.steps": job.steps,
        "settings.lr": method.optimizer.defaults["lr"],
        "versions.torch": torch.__version__,
        "versions.transformers": transformers.__version__,
    }


def _write_report(
    job: Run, results: report.Report, losses: list[float], before: Measurement, after: Measurement
) -> report.Report:
    """Write answers, plot and report, print the table, and return the report."""
    report.write_answers(job.folder / run_dir.ANSWERS, answer_rows(job.data.heldout, before, after))
    report.plot_losses(results, losses, list(job.clock.refreshes), job.folder / run_dir.PLOT)
    report.write_json(results, job.folder / run_dir.REPORT)  # written last: a run with a report is finished
    run_dir.finish(job.folder)
    print(f"\n{report.table(results)}\n\nwritten to {job.folder}: report.json, answers.jsonl, loss.png, model/")
    return results
