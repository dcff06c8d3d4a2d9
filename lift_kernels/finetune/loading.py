"""What a run starts from: model, tokenizer, data and neutral text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from .config import DTYPES, Settings
from .data import RunData, prepare_data
from .forward import form_of
from .metrics import choose_metric
from .model_io import Source, find_model, load_model, stored_dtype
from .model_kinds import check_tokens, position_limit
from .neutral import neutral_pieces
from .parallel import Ranks
from .prompts import Example
from .training import check_batch, steps_of


@dataclass
class Loaded:
    """What a run starts from.

    Attributes:
        settings: options of the run.
        source: where the model was loaded from.
        data: training sequences and held-out samples.
        steps: optimizer steps.
        model: the model, on its device.
        tokenizer: its tokenizer.
        neutral: what the neutral text is, and its pieces.
    """

    settings: Settings
    source: Source
    data: RunData
    steps: int
    model: Any
    tokenizer: Any
    neutral: tuple[str, list[Example]]


def load(settings: Settings, ranks: Ranks) -> Loaded:
    """Load model and tokenizer, and prepare the data.

    Raises:
        UserError: for a model or data that cannot be used.
    """
    source = find_model(settings.model)
    transformers.set_seed(settings.seed)
    model: Any
    model, tokenizer = load_model(source, DTYPES[settings.dtype])
    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    model.to(torch.device("cpu" if device == "auto" else device))
    print(f"model: {source.description}, {settings.dtype}, on {model.device}")
    stored = stored_dtype(source)
    if stored not in (None, DTYPES[settings.dtype]):
        name = str(stored).removeprefix("torch.")
        print(
            f"dtype: stored as {name}, trained and saved as {settings.dtype}; --dtype {name} trains it as it is. To "
            f"apply a delta of this run in Python, load the base with dtype=torch.{settings.dtype}"
        )
    form_of(model)  # refuses a model that cannot be called, before the run has a directory
    data = prepare_data(settings, tokenizer, model)
    print(f"data: {data.description}")
    metric = choose_metric(data.heldout, settings.metric, tokenizer)
    data = replace(data, metric=metric.name)
    print(f"metric: {metric.name}, {metric.why}")
    neutral = neutral_pieces(tokenizer, settings.neutral, position_limit(model.config))
    check_tokens(model, tokenizer, [*data.sequences, *data.encoded], data.longest, data.together)
    check_batch(settings, data, ranks)
    return Loaded(
        settings=settings,
        source=source,
        data=data,
        steps=settings.steps or steps_of(settings.epochs or 1, data),
        model=model,
        tokenizer=tokenizer,
        neutral=neutral,
    )
