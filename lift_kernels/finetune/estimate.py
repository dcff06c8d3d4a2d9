"""How long a run will take, from the tokens that it reads and a few passes that are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..checkpoint.training_state import rng_state, set_rng_state
from . import prompts
from .config import FIXED, SPARSE, Settings
from .data import RunData
from .evaluation import answer_loss
from .forward import Form, form_of, logits_at
from .measure import EVAL_BATCH, GENERATION_BATCH
from .parallel import Ranks
from .precision import autocast
from .timing import Clock

PASSES = 2
"""How often a pass is timed. The fastest counts, because the first one compiles and allocates."""
MORE_TOKENS = 8
"""How many tokens an answer may have beyond those of the longest expected one (`measure`)."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that one rank reads and writes, padding included.

    Attributes:
        training: of the batches of all steps.
        measured: of the texts whose loss is measured, at one time.
        asked: of the prompts that are answered, at one time.
        written: passes that write a token of each answer of a batch, at one time. They are a bound:
            answers may end earlier.
    """

    training: int
    measured: int
    asked: int
    written: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of the parts of a run, and what they were computed from.

    Attributes:
        tokens: what a rank reads and writes.
        steps: optimizer steps.
        measurements: how often the model is measured.
        training: forward and backward passes. Optimizer steps take little in comparison.
        masks: new masks, where none is skipped.
        losses: measuring losses.
        answers: answering prompts, at most.
    """

    tokens: Tokens
    steps: int
    measurements: int
    training: float
    masks: float
    losses: float
    answers: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return self.training + self.masks + self.losses + self.answers

    def __str__(self) -> str:
        when = "before and after" if self.measurements > 1 else "after"
        parts = [
            f"{span(self.training)} of training ({self.steps} steps)",
            *[f"up to {span(self.masks)} of new masks"] * (self.masks >= 1),
            f"{span(self.losses + self.answers)} of measuring {when}",
        ]
        return f"about {span(self.total)}: {', '.join(parts)}, on this machine as it is now"


def span(seconds: float) -> str:
    """Return a time as people say it, such as 40 s, 4 min or 2.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def estimate(
    model: Any,
    tokenizer: Any,
    data: RunData,
    steps: int,
    settings: Settings,
    neutral_tokens: int,
    *,
    ranks: Ranks | None = None,
    measurements: int = 2,
    mask_seconds: float = 0.0,
) -> Estimate:
    """Estimate how long a run takes, by passes with the model, the method and the precision of it.

    The passes leave no trace in weights, gradients, optimizer and random generators. Every rank
    times its own share, and waits for no other.

    Args:
        model: the model that `methods.prepare` has returned, not yet wrapped for several ranks.
        tokenizer: its tokenizer.
        data: training sequences and held-out samples.
        steps: optimizer steps to come.
        settings: options of the run.
        neutral_tokens: tokens of the neutral text.
        ranks: the ranks that share the work; None for one.
        measurements: how often the model will be measured.
        mask_seconds: seconds that all masks of the model take once.
    """
    ranks, form = ranks or Ranks(), form_of(model)
    batches = training_batches(data, settings)
    tokens = Tokens(
        training=_training_tokens(batches, data, steps, settings, ranks, form),
        measured=_measured_tokens(data, ranks, form) + neutral_tokens // ranks.count,
        asked=_asked_tokens(data, ranks, form),
        written=_written_passes(data, ranks, form),
    )
    with _undisturbed(model):
        train, read, write = _timed_passes(model, tokenizer, data, batches, settings, ranks, form)
    later = steps // settings.refresh_interval if settings.refresh_interval else 0
    return Estimate(
        tokens=tokens,
        steps=steps,
        measurements=measurements,
        training=tokens.training * train,
        masks=mask_seconds * later if settings.method in SPARSE and settings.method not in FIXED else 0.0,
        losses=measurements * tokens.measured * read,
        answers=measurements * (tokens.asked * read + tokens.written * write),
    )


def training_batches(data: RunData, settings: Settings) -> list[list[int]]:
    """Return the sequences of each backward pass of an epoch, by their number.

    They are drawn as in training, but by a generator of their own, so that their order is another.
    """
    lengths = [len(sequence["input_ids"]) for sequence in data.sequences]
    generator = torch.Generator().manual_seed(settings.seed)
    order = list(LengthGroupedSampler(data.rows, lengths=lengths, generator=generator))
    size = data.rows // settings.accumulation
    return [order[start : start + size] for start in range(0, len(order), size)]


def _area(lengths: Sequence[int], form: Form) -> int:
    """Return the tokens of a batch. A model that reads padding gets its rows without it."""
    return max(lengths, default=0) * len(lengths) if form.padding else sum(lengths)


def _training_tokens(
    batches: Sequence[list[int]], data: RunData, steps: int, settings: Settings, ranks: Ranks, form: Form
) -> int:
    lengths = [len(sequence["input_ids"]) for sequence in data.sequences]
    each = [_area([lengths[i] for i in ranks.own(batch)], form) for batch in batches]
    epochs, rest = divmod(steps, math.ceil(len(lengths) / data.rows))
    return epochs * sum(each) + sum(each[: rest * settings.accumulation])


def _measured_tokens(data: RunData, ranks: Ranks, form: Form) -> int:
    lengths = sorted(len(example["input_ids"]) for example in ranks.own(data.encoded))
    return sum(_area(lengths[start : start + EVAL_BATCH], form) for start in range(0, len(lengths), EVAL_BATCH))


def _asked_tokens(data: RunData, ranks: Ranks, form: Form) -> int:
    """Return the tokens of all prompts. A cache holds the prefix, where the model has one."""
    if data.metric == "none":
        return 0
    cached = form.padding and form.cache is not None
    before, once = (0, len(data.prefix)) if cached else (len(data.prefix), 0)
    lengths = sorted(before + len(ids) for ids in ranks.own(data.asked))
    starts = range(0, len(lengths), GENERATION_BATCH)
    return once + sum(_area(lengths[start : start + GENERATION_BATCH], form) for start in starts)


def _written_passes(data: RunData, ranks: Ranks, form: Form) -> int:
    if data.metric == "none":
        return 0
    longest = max(sum(label != prompts.IGNORE for label in example["labels"]) for example in data.encoded)
    batch = GENERATION_BATCH if form.padding else 1
    return math.ceil(len(ranks.own(data.asked)) / batch) * (longest + MORE_TOKENS)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Give gradients, the mode of the model and random generators back as they were."""
    random, training = rng_state(), model.training
    kept = [(p, p.grad, getattr(p, "lift_grad", None)) for p in model.parameters()]
    for p, _, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient, packed in kept:
            p.grad = gradient
            if getattr(p, "lift_grad", None) is not None:
                p.lift_grad = packed
        model.train(training)
        set_rng_state(random)


def _timed_passes(
    model: Any,
    tokenizer: Any,
    data: RunData,
    batches: Sequence[list[int]],
    settings: Settings,
    ranks: Ranks,
    form: Form,
) -> tuple[float, float, float]:
    """Return seconds a token of training, a token of reading, and a pass that writes tokens."""
    by_size = sorted(batches, key=lambda batch: sum(len(data.sequences[i]["input_ids"]) for i in batch))
    typical = by_size[len(by_size) // 2]
    trained = [data.sequences[i] for i in ranks.own(typical) or typical[:1]]
    held = sorted(data.encoded, key=lambda example: len(example["input_ids"]))
    middle = held[max(0, (len(held) - EVAL_BATCH) // 2) :][:EVAL_BATCH]
    model.train()
    train = _pass_seconds(model, tokenizer, trained, settings, lambda loss: loss.backward())
    model.eval()
    with torch.no_grad():
        read = _pass_seconds(model, tokenizer, middle, settings, lambda loss: loss)
        rows = min(GENERATION_BATCH if form.padding else 1, len(data.asked))
        write = _token_seconds(model, rows, settings) if data.metric != "none" else 0.0
    lengths = ([len(example["input_ids"]) for example in examples] for examples in (trained, middle))
    return train / _area(next(lengths), form), read / _area(next(lengths), form), write


def _pass_seconds(
    model: Any, tokenizer: Any, examples: Sequence[prompts.Example], settings: Settings, finish: Callable
) -> float:
    """Return the seconds of a pass over a batch, from its loss to what ``finish`` does with it."""
    batch = {k: v.to(model.device) for k, v in prompts.collate(examples, tokenizer.pad_token_id).items()}

    def work() -> None:
        with autocast(settings, model.device):
            loss, tokens = answer_loss(model, batch)
        finish(loss / tokens)

    return _fastest(work, model.device)


def _token_seconds(model: Any, rows: int, settings: Settings) -> float:
    """Return the seconds of a pass that reads one token of each row."""
    ids = torch.ones(rows, 1, dtype=torch.long, device=model.device)

    def work() -> None:
        with autocast(settings, model.device):
            logits_at(model, ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long, device=model.device))

    return _fastest(work, model.device)


def _fastest(work: Callable[[], None], device: torch.device) -> float:
    clock, spans = Clock(device), []
    for _ in range(PASSES):
        start = clock.now()
        work()
        spans.append(clock.now() - start)
    return min(spans)
