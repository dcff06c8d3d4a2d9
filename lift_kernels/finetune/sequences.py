"""From samples to training sequences: encoding, length limit, joining and packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from . import prompts
from .config import Settings
from .packing import pack
from .prompts import Example, Sample


def encode_samples(
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: Settings,
    part: str,
    alone: bool = False,
    cut: bool = False,
) -> tuple[list[Sample], list[Example]]:
    """Encode samples, and leave out or cut those of more than ``settings.max_length`` tokens.

    Args:
        tokenizer: tokenizer of the model.
        samples: samples to encode.
        settings: options of the run.
        part: name of the samples for messages.
        alone: whether each is a text of its own, see `prompts.encode`.
        cut: whether long samples are cut. One whose prompt leaves nothing to learn is left out.

    Returns:
        The samples that are kept, and their encodings.

    Raises:
        UserError: when no sample is short enough.
    """
    kept, shortened = [], 0
    for sample in samples:
        example = prompts.encode(tokenizer, sample, settings.loss, alone)
        if len(example["input_ids"]) > settings.max_length:
            if not cut:
                continue
            example = {key: ids[: settings.max_length] for key, ids in example.items()}
            if all(label == prompts.IGNORE for label in example["labels"]):
                continue
            shortened += 1
        kept.append((sample, example))
    limit = f"{settings.max_length} tokens"
    if not kept:
        raise UserError(f"no {part} sample has at most {limit}; raise --max-length")
    if shortened:
        print(f"{shortened} {part} samples have more than {limit} and are cut")
    if len(kept) < len(samples):
        print(f"{len(samples) - len(kept)} {part} samples have more than {limit} and are left out")
    return [sample for sample, _ in kept], [example for _, example in kept]


def training_sequences(
    tokenizer: Any, examples: Sequence[Example], settings: Settings, shots: int
) -> tuple[list[Example], int]:
    """Make training sequences of encoded samples.

    With worked examples, up to so many samples join into a sequence: a model that is trained on
    single samples only is confused by the worked examples of a prompt.

    Args:
        tokenizer: tokenizer of the model.
        examples: encoded samples.
        settings: options of the run.
        shots: worked examples in front of each question.

    Returns:
        The sequences, and how many of them make a batch.

    Raises:
        UserError: when they do not fill one batch.
    """
    size = settings.batch_size
    if settings.packing:
        sequences = pack(examples, settings.max_length)
        if len(sequences) < size:
            raise UserError(
                f"{len(examples)} training samples are packed into {len(sequences)} sequences of {settings.max_length} "
                f"tokens, which do not fill a batch of {size}; lower --batch-size or --max-length"
            )
        return sequences, size
    if len(examples) < size:
        raise UserError(f"{len(examples)} training samples do not fill a batch of {size}; lower --batch-size")
    if not shots:
        return list(examples), size
    each = max(n for n in range(1, shots + 1) if size % n == 0)
    chunks = [examples[i : i + each] for i in range(0, len(examples), each)]
    return [prompts.join(tokenizer, chunk) for chunk in chunks], size // each
