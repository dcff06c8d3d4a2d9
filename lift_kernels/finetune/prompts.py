"""From problems to token ids: the prompt format, labels on answers alone, several problems in one
sequence, padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .word_problems import Problem

Example = dict[str, list[int]]  # "input_ids" and "labels"

IGNORE = -100  # the label that no loss counts


def prompt(question: str) -> str:
    """The text in front of an answer; the answer follows after one space."""
    return f"Question: {question.strip()}\nAnswer:"


def completion(answer: str) -> str:
    """The text that a model has to produce after ``prompt(question)``: one line, ended by a
    newline.
    """
    return f" {' '.join(answer.split())}\n"


def opening(tokenizer) -> list[int]:
    """The token that the tokenizer puts in front of every text, if it has one."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def encode(tokenizer, problem: Problem) -> Example:
    """Token ids of prompt and answer with labels on the answer alone."""
    head = tokenizer(prompt(problem.question), add_special_tokens=False)["input_ids"]
    tail = tokenizer(completion(problem.answer), add_special_tokens=False)["input_ids"]
    return {"input_ids": head + tail, "labels": [IGNORE] * len(head) + tail}


def join(tokenizer, examples: Sequence[Example]) -> Example:
    """One sequence of several examples, so that the later ones are answered with the earlier ones
    in view.
    """
    start = opening(tokenizer)
    ids, labels = ([token for example in examples for token in example[key]] for key in ("input_ids", "labels"))
    return {"input_ids": start + ids, "labels": [IGNORE] * len(start) + labels}


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Tensors of a batch, padded on the left, so that generation continues every row in the same
    column.
    """
    width = max(len(e["input_ids"]) for e in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for e in examples:
        gap = width - len(e["input_ids"])
        rows["input_ids"].append([pad] * gap + e["input_ids"])
        rows["attention_mask"].append([0] * gap + [1] * len(e["input_ids"]))
        rows["labels"].append([IGNORE] * gap + e["labels"])
    return {key: torch.tensor(value) for key, value in rows.items()}
