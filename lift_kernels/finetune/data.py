"""The data of a run: generated or read, split, encoded and joined into sequences."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import metrics, prompts, word_problems
from .config import STEPS, Settings
from .forms import QUESTION, read_samples
from .forward import check_packing
from .prompts import Example, Sample
from .sequences import encode_samples, training_sequences

SHOTS = 4
"""Worked examples in front of a question about a number, and the most of them in a sequence."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is measured on.

    Attributes:
        sequences: training sequences.
        rows: how many of them make a batch, that is a step.
        heldout: held-out samples.
        encoded: their whole texts, one by one, labelled as in training.
        asked: token ids of their prompts.
        prefix: token ids of the worked examples in front of each prompt; [] without any.
        lines: whether an answer ends with its line, as after worked examples.
        metric: how answers are scored, one of METRICS, by all samples.
        longest: tokens of the longest sample.
        together: the most samples in a text that the model reads.
        description: a line about the data.
    """

    sequences: list[Example]
    rows: int
    heldout: list[Sample]
    encoded: list[Example]
    asked: list[list[int]]
    prefix: list[int]
    lines: bool
    metric: str
    longest: int
    together: int
    description: str


@dataclass(frozen=True)
class Choice:
    """The samples of a run, by their use. No prompt is in two of the lists.

    Attributes:
        train: samples to train on.
        heldout: samples to measure with.
        shown: worked examples in front of each question.
        metric: how answers are scored, one of METRICS.
        origin: where the samples are from.
    """

    train: list[Sample]
    heldout: list[Sample]
    shown: list[Sample]
    metric: str
    origin: str


def prepare_data(settings: Settings, tokenizer: Any, model: Any = None) -> RunData:
    """Read or generate the samples of a run, split and encode them.

    Samples without worked examples are texts of their own, which end with the end-of-text token. A
    batch has ``settings.batch_size`` samples; with packing it has so many sequences.

    Args:
        settings: options of the run.
        tokenizer: tokenizer of the model.
        model: the model, which packing needs: it is asked whether it keeps packed samples apart.

    Raises:
        UserError: for data or options that cannot be used.
        ValueError: for packing without a model.
    """
    if settings.packing:
        if model is None:
            raise ValueError("prepare_data needs the model for packing")
        check_packing(model)
    chosen = choose_samples(settings, tokenizer)
    alone, shots = not chosen.shown, len(chosen.shown)
    if settings.truncate and not alone:
        raise UserError("truncate would cut the results of worked answers; leave out --truncate, or give --shots 0")
    _, examples = encode_samples(tokenizer, chosen.train, settings, "training", alone, settings.truncate)
    heldout, encoded = encode_samples(tokenizer, chosen.heldout, settings, "held-out", alone)
    shown = encode_samples(tokenizer, chosen.shown, settings, "few-shot")[1] if shots else []
    sequences, rows = training_sequences(tokenizer, examples, settings, shots)
    counts = f"{len(examples)} for training, {len(heldout)} held out"
    if settings.packing:
        counts += f"; packed into {len(sequences)} sequences, {rows} in a batch"
    return RunData(
        sequences=sequences,
        rows=rows,
        heldout=heldout,
        encoded=encoded if alone else [prompts.join(tokenizer, [example]) for example in encoded],
        asked=[prompts.encode_prompt(tokenizer, sample, alone) for sample in heldout],
        prefix=prompts.join(tokenizer, shown)["input_ids"] if shown else [],
        lines=not alone,
        metric=chosen.metric,
        longest=max(len(e["input_ids"]) for e in [*examples, *encoded, *shown]),
        together=shots + 1,
        description=f"{chosen.origin}: {counts}",
    )


def read_problems(path: str | Path) -> list[Sample]:
    """Read a file of questions and answers.

    Returns:
        The samples in the order of the file. A repeated question is kept once.

    Raises:
        UserError: for a file that cannot be read, and for other rows.
    """
    form, samples = read_samples([str(path)], "train", None)
    if form != QUESTION:
        raise UserError(f"{path} has no question and answer; give a file with these columns")
    return different(samples)


def different(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose prompts differ; of samples with equal ones the first.

    White space makes no difference. Plain texts have no prompt and count as a whole.
    """
    kept: dict[str, Sample] = {}
    for sample in samples:
        kept.setdefault(" ".join((sample.prompt or sample.completion).split()), sample)
    return list(kept.values())


def choose_samples(settings: Settings, tokenizer: Any) -> Choice:
    """Generate or read the samples of a run and split them.

    At most a fifth is held out.

    Raises:
        UserError: for data that cannot be used or holds too few samples.
    """
    if not settings.data:
        return _generated_choice(settings)
    origin = ", ".join(settings.data)
    form, found = read_samples(settings.data, settings.split, tokenizer)
    samples = different(found)
    if len(samples) < len(found):
        print(f"{len(found) - len(samples)} samples of {origin} repeat a prompt and are left out")
    # Without a score, samples stay the same.
    metric = metrics.choose_metric(samples, None if settings.metric == "none" else settings.metric, tokenizer).name
    shots = _shots(settings, form, metric)
    if shots:
        samples = [prompts.worked_example(s.question, s.answer, s.where) for s in samples]
    random.Random(settings.seed).shuffle(samples)
    held = _held_out(len(samples), settings)
    batch = 1 if settings.packing else settings.batch_size
    if held == 0 or len(samples) < held + shots + batch:
        enough = (n for n in itertools.count(5) if n >= _held_out(n, settings) + shots + batch)
        lower = f", or lower --batch-size ({batch})" if batch > 1 else ""
        raise UserError(f"{origin} holds {len(samples)} different samples; give at least {next(enough)}{lower}")
    heldout, shown, train = samples[:held], samples[held : held + shots], samples[held + shots :]
    return Choice(train, heldout, shown, settings.metric or metric, origin)


def _held_out(count: int, settings: Settings) -> int:
    return min(settings.eval_problems, count // 5)


def _shots(settings: Settings, form: str, metric: str) -> int:
    """Return how many worked examples stand in front of a question."""
    if settings.shots and form != QUESTION:
        raise UserError(f"shots is {settings.shots}, and only questions with answers follow others; leave out --shots")
    if settings.shots is not None:
        return settings.shots
    return SHOTS if form == QUESTION and metric == "number" and not settings.packing else 0


def _generated_choice(settings: Settings) -> Choice:
    metric = settings.metric or "number"
    shots = _shots(settings, QUESTION, "number")
    # A packed sequence holds several problems.
    each = max(1, settings.max_length // 64) if settings.packing else 1
    count = (settings.steps or STEPS) * settings.batch_size * each
    heldout = _generated(settings.eval_problems, "heldout", settings, shots)
    train = _generated(count + shots, "train", settings, shots)
    return Choice(train[shots:], heldout, train[:shots], metric, "generated word problems")


def _generated(count: int, split: word_problems.Split, settings: Settings, shots: int) -> list[Sample]:
    level: Any = settings.problems
    found = word_problems.generate(count, split, settings.seed, level)
    make = prompts.worked_example if shots else prompts.single_example
    return [make(problem.question, problem.answer) for problem in found]
