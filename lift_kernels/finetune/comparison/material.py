"""What all runs of a comparison share: the untrained model, and the parts of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from ...delta.model_weights import fingerprint
from ...errors import UserError
from ..config import DTYPES
from ..data import RunData, prepare_data
from ..forward import form_of
from ..metrics import choose_metric
from ..model_io import find_model, load_model
from ..model_kinds import check_tokens, position_limit
from ..neutral import neutral_pieces
from ..parallel import Ranks
from ..prompts import Example
from ..training import check_batch, steps_of
from .options import OF_SETTINGS, Comparison, saved_form

FRONTIER_PIECES = 20
"""Pieces of neutral text that are measured before the final stage."""
NOT_TRAINING = ("model", "data", "neutral", "device")
"""Settings that are names of what the digests are of, or do not change results."""


@dataclass(frozen=True)
class Material:
    """What all runs share.

    Attributes:
        options: options of the comparison.
        model: the untrained model, on the CPU; every run trains a copy.
        tokenizer: its tokenizer.
        device: where the runs train.
        train: training sequences, and the samples of the validation part.
        test: the same with the samples of the test part, which no choice may depend on.
        neutral: pieces of neutral text.
        steps: optimizer steps of a run.
        digests: what identifies model and data, by name.
    """

    options: Comparison
    model: Any
    tokenizer: Any
    device: torch.device
    train: RunData
    test: RunData
    neutral: list[Example]
    steps: int
    digests: dict[str, str]

    def part(self, name: str) -> RunData:
        """Return the data with the samples of a part, "validation" or "test"."""
        return self.test if name == "test" else self.train

    @property
    def fingerprint(self) -> str:
        """Of the model, the data and the settings that all rows share."""
        form = saved_form(self.options)
        shared = {name: form[name] for name in OF_SETTINGS if name not in NOT_TRAINING}
        return _digest([shared, self.digests])[:16]


def load(options: Comparison) -> Material:
    """Load the model and the data of a comparison.

    Raises:
        UserError: for a model or data that cannot be used, and for too few samples.
    """
    settings = options.settings
    source = find_model(settings.model)
    transformers.set_seed(settings.seed)
    model, tokenizer = load_model(source, DTYPES[settings.dtype])
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    device = "cpu" if device == "auto" else device
    print(f"model: {source.description}, {settings.dtype}, on {device}")
    form_of(model)
    train, test, origin = _data(options, model, tokenizer)
    print(f"data: {origin}")
    check_batch(settings, train, Ranks())
    check_tokens(model, tokenizer, [*train.sequences, *train.encoded, *test.encoded], train.longest, train.together)
    description, pieces = neutral_pieces(tokenizer, settings.neutral, position_limit(model.config))
    neutral = pieces[: options.pieces]
    print(f"neutral text: {len(neutral)} pieces of {description}")
    return Material(
        options=options,
        model=model,
        tokenizer=tokenizer,
        device=torch.device(device),
        train=train,
        test=test,
        neutral=neutral,
        steps=settings.steps or steps_of(settings.epochs or 1, train),
        digests={
            "model": fingerprint(model.state_dict()),
            "training data": _digest([train.sequences, train.rows]),
            "validation part": _digest([train.encoded, train.asked, train.prefix]),
            "test part": _digest([test.encoded, test.asked, test.prefix]),
            "neutral text": _digest(neutral),
        },
    )


def _data(options: Comparison, model: Any, tokenizer: Any) -> tuple[RunData, RunData, str]:
    """Return the data with each part, and a line about them.

    Without a metric the samples are still those of finetune, which chooses one by the answers.
    """
    settings = replace(options.settings, eval_problems=options.validation + options.test)
    asked = settings.metric
    data = prepare_data(replace(settings, metric=None if asked == "none" else asked), tokenizer, model)
    train, test = split(data, options)
    test = replace(test, metric=choose_metric(test.heldout, asked, tokenizer).name)
    parts = f"{len(train.heldout)} for validation and {len(test.heldout)} for the test"
    if len(data.heldout) < settings.eval_problems:
        parts += f" ({options.validation} and {options.test} were asked for)"
    return train, test, f"{data.description}: {parts}"


def split(data: RunData, options: Comparison) -> tuple[RunData, RunData]:
    """Return the data with the first held-out samples for validation, and with the rest.

    Where there are fewer than asked for, both parts shrink alike.

    Raises:
        UserError: where a part has fewer than two samples.
    """
    count, wanted = len(data.heldout), options.validation + options.test
    first = options.validation if count >= wanted else round(count * options.validation / wanted)
    if min(first, count - first) < 2:
        raise UserError(
            f"the data leave {count} held-out samples for validation and test, and each needs at least 2; give more "
            "--data"
        )
    return _take(data, slice(0, first)), _take(data, slice(first, wanted))


def _take(data: RunData, which: slice) -> RunData:
    return replace(data, heldout=data.heldout[which], encoded=data.encoded[which], asked=data.asked[which])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tokens_of(examples: Sequence[Example]) -> int:
    """Return the tokens of examples."""
    return sum(len(example["input_ids"]) for example in examples)
