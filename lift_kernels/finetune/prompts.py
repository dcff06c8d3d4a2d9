"""From problems to token ids: prompt format, labels, joined sequences and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Example = dict[str, list[int]]  # "input_ids" and "labels"

IGNORE = -100  # the label that a loss skips


@dataclass(frozen=True)
class Sample:
    """A text to learn from.

    Attributes:
        prompt: the part that is given; "" for plain text.
        completion: the part that is learned.
        question: what was asked, for people.
        answer: the expected answer, for the metric; "" where there is none.
        where: file and line that it is from; "" for a generated sample.
        whole: whether the text has its opening and ending tokens already, as that of a chat
            template.
    """

    prompt: str
    completion: str
    question: str = ""
    answer: str = ""
    where: str = ""
    whole: bool = False


def prompt(question: str) -> str:
    """Return the text in front of an answer; the answer follows after one space."""
    return f"Question: {question.strip()}\nAnswer:"


def completion(answer: str) -> str:
    """Return the text that a model has to produce after `prompt`: one line and a newline."""
    return f" {' '.join(answer.split())}\n"


def opening(tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts in front of every text: one, or none."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def worked_example(question: str, answer: str, where: str = "") -> Sample:
    """Return a question with its answer as a sample that others can follow in one sequence."""
    return Sample(prompt(question), completion(answer), question, answer, where)


def encode(tokenizer, sample: Sample) -> Example:
    """Return the token ids of prompt and completion, with labels on the completion alone."""
    head = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    tail = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
    return {"input_ids": head + tail, "labels": [IGNORE] * len(head) + tail}


def join(tokenizer, examples: Sequence[Example]) -> Example:
    """Join several examples into one sequence, in which later ones see the earlier ones."""
    start = opening(tokenizer)
    ids, labels = ([token for example in examples for token in example[key]] for key in ("input_ids", "labels"))
    return {"input_ids": start + ids, "labels": [IGNORE] * len(start) + labels}


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Pad examples on the left and stack them into a batch.

    With padding on the left, generation continues every row in the same column.

    Args:
        examples: encoded examples.
        pad: id of the padding token.

    Returns:
        Input ids, attention mask and labels: int64, each (examples, longest example).
    """
    width = max(len(e["input_ids"]) for e in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in examples:
        gap = width - len(e["input_ids"])
        rows["input_ids"].append([pad] * gap + e["input_ids"])
        rows["attention_mask"].append([0] * gap + [1] * len(e["input_ids"]))
        rows["labels"].append([IGNORE] * gap + e["labels"])
    return {key: torch.tensor(value) for key, value in rows.items()}


def take_rows(batch: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return rows of a batch of `collate`, without the columns that are padding in all of them."""
    columns = batch["attention_mask"][rows].any(0)
    return {key: value[rows][:, columns] for key, value in batch.items()}
