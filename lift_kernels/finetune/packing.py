"""Samples packed into sequences in which they do not see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import UserError
from .prompts import Example


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Pack examples into sequences of at most max_length tokens, by TRL's best-fit decreasing.

    Args:
        examples: encoded samples of at most max_length tokens each.
        max_length: most tokens of a sequence.

    Returns:
        The sequences. Their "position_ids" begin again with each sample, by which models of
        transformers keep samples apart.

    Raises:
        UserError: when trl is missing.
    """
    try:
        from datasets import Dataset
        from trl import pack_dataset
    except ImportError as error:
        raise UserError("--packing needs the package trl; run `pip install trl`") from error
    columns = {key: [example[key] for example in examples] for key in ("input_ids", "labels")}
    with _no_progress_bar():
        packed: Any = pack_dataset(Dataset.from_dict(columns), max_length, map_kwargs={"keep_in_memory": True})
    return [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "position_ids": [position for length in row["seq_lengths"] for position in range(length)],
        }
        for row in packed
    ]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
