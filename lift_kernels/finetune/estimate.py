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
from .decoding import CACHED_TOKENS
from .evaluation import answer_loss, batches
from .forward import Form, form_of, logits_at
from .measure import EVAL_BATCH, GENERATION_BATCH, completions
from .parallel import Ranks
from .precision import autocast
from .timing import Clock

PASSES = {"cpu": 1, "cuda": 2}
"""How often a pass is timed. The fastest counts: on a GPU the first one compiles and allocates."""
MORE_TOKENS = 8
"""How many tokens an answer may have beyond those of the longest expected one (`measure`)."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that one rank reads and writes, padding included.

    Attributes:
        training: of the batches of all steps.
        measured: of the texts whose loss is measured, at one time.
        asked: of the prompts that are answered, at one time, and of answers to choose from.
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
    passes = training_batches(data, settings)
    asked, written = _answering(data, ranks, form)
    tokens = Tokens(
        training=_training_tokens(passes, data, steps, settings, ranks, form),
        measured=_measured_tokens(data, ranks, form) + neutral_tokens // ranks.count,
        asked=asked,
        written=written,
    )
    with _undisturbed(model):
        train, read, write = _timed_passes(model, tokenizer, data, passes, settings, ranks, form)
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
    passes: Sequence[list[int]], data: RunData, steps: int, settings: Settings, ranks: Ranks, form: Form
) -> int:
    lengths = [len(sequence["input_ids"]) for sequence in data.sequences]
    each = [_area([lengths[i] for i in ranks.own(batch)], form) for batch in passes]
    epochs, rest = divmod(steps, math.ceil(len(lengths) / data.rows))
    return epochs * sum(each) + sum(each[: rest * settings.accumulation])


def _measured_tokens(data: RunData, ranks: Ranks, form: Form) -> int:
    own = ranks.own(data.encoded)
    lengths = [[len(own[i]["input_ids"]) for i in batch] for batch in batches(own, EVAL_BATCH)]
    return sum(_area(batch, form) for batch in lengths)


def _answering(data: RunData, ranks: Ranks, form: Form) -> tuple[int, int]:
    """Return the tokens that are read and the passes that write, to answer all prompts once.

    A cache holds the worked examples, where the model has one.
    """
    own = ranks.own(data.asked)
    if data.metric == "none" or not own:
        return 0, 0
    cached = form.padding and form.cache is not None
    before, once = (0, len(data.prefix)) if cached else (len(data.prefix), 0)
    answers = completions(data)
    if data.metric == "choice":  # each prompt is read by itself, and continued by each of the answers
        choices = sum(len(ids) for ids in {tuple(ids) for ids in answers})
        return once + sum(before + len(ids) + choices for ids in own), 0
    new, lengths = max(map(len, answers)) + MORE_TOKENS, sorted(before + len(ids) for ids in own)
    rows = _answer_rows(data, form)
    starts = range(0, len(lengths), rows)
    return once + sum(_area(lengths[start : start + rows], form) for start in starts), len(starts) * new


def _answer_rows(data: RunData, form: Form) -> int:
    """Return how many prompts are answered in a batch."""
    if not form.padding:
        return 1
    longest = len(data.prefix) + max(map(len, data.asked)) + max(map(len, completions(data))) + MORE_TOKENS
    return max(1, min(GENERATION_BATCH, CACHED_TOKENS // longest, len(data.asked)))


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
    passes: Sequence[list[int]],
    settings: Settings,
    ranks: Ranks,
    form: Form,
) -> tuple[float, float, float]:
    """Return seconds a token of training, a token of reading, and a pass that writes tokens."""
    by_size = sorted(passes, key=lambda batch: sum(len(data.sequences[i]["input_ids"]) for i in batch))
    typical = by_size[len(by_size) // 2]
    trained = [data.sequences[i] for i in ranks.own(typical) or typical[:1]]
    held = sorted(data.encoded, key=lambda example: len(example["input_ids"]))
    middle = held[max(0, (len(held) - EVAL_BATCH) // 2) :][:EVAL_BATCH]
    model.train()
    train = _pass_seconds(model, tokenizer, trained, settings, lambda loss: loss.backward())
    model.eval()
    with torch.no_grad():
        read = _pass_seconds(model, tokenizer, middle, settings, lambda loss: loss)
        writes = data.metric not in ("none", "choice") and data.asked
        write = _token_seconds(model, _answer_rows(data, form), settings) if writes else 0.0
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
    for _ in range(PASSES.get(device.type, 2)):
        start = clock.now()
        work()
        spans.append(clock.now() - start)
    return min(spans)
