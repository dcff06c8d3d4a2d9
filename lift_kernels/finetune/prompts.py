"""From problems to token ids: prompt format, labels, joined sequences and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Example = dict[str, list[int]]  # "input_ids" and "labels"; also "position_ids" of packed samples

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


def single_example(question: str, answer: str, where: str = "") -> Sample:
    """Return a question with its answer, which keeps its lines, as a text of its own."""
    return Sample(prompt(question), f" {answer.strip()}", question, answer, where)


def encode(tokenizer, sample: Sample, loss: str = "answers", alone: bool = False) -> Example:
    """Return the token ids and labels of a sample.

    A prompt has the same tokens as when the model answers it.

    Args:
        tokenizer: tokenizer of the model.
        sample: the sample.
        loss: "answers" labels the completion alone, "all" the prompt too.
        alone: whether the sample is a text of its own. It begins with the tokenizer's opening token
            and ends with the end-of-text token then, unless it has them already.
    """
    head = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    tail = _continuation(tokenizer, sample, head)
    start: list[int] = []
    if alone and not sample.whole:
        start = _missing_opening(tokenizer, head or tail)
        tail = tail if tail[-1:] == [tokenizer.eos_token_id] else [*tail, tokenizer.eos_token_id]
    labels = [IGNORE] * len(start) + ([IGNORE] * len(head) if loss == "answers" else head) + tail
    return {"input_ids": start + head + tail, "labels": _unlabelled_first(labels) if alone else labels}


def _continuation(tokenizer, sample: Sample, head: list[int]) -> list[int]:
    """Return the ids of a completion after its prompt, which has the ids ``head``.

    They are those in the whole text, because some tokenizers put a space in front of whatever they
    encode. A completion that shares a token with the prompt is encoded alone.
    """
    whole = tokenizer(sample.prompt + sample.completion, add_special_tokens=False)["input_ids"]
    if len(whole) > len(head) and whole[: len(head)] == head:
        return whole[len(head) :]
    return tokenizer(sample.completion, add_special_tokens=False)["input_ids"]


def encode_prompt(tokenizer, sample: Sample, alone: bool = False) -> list[int]:
    """Return the token ids of a prompt as `encode` has them."""
    head = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    return _missing_opening(tokenizer, head) + head if alone and not sample.whole else head


def _missing_opening(tokenizer, ids: list[int]) -> list[int]:
    start = opening(tokenizer)
    return [] if start == ids[:1] else start


def _unlabelled_first(labels: list[int]) -> list[int]:
    """Return the labels of a text, whose first token nothing predicts."""
    return [IGNORE, *labels[1:]]


def join(tokenizer, examples: Sequence[Example]) -> Example:
    """Join several examples into one sequence, in which later ones see the earlier ones."""
    start = opening(tokenizer)
    ids, labels = ([token for example in examples for token in example[key]] for key in ("input_ids", "labels"))
    return {"input_ids": start + ids, "labels": _unlabelled_first([IGNORE] * len(start) + labels)}


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Pad examples on the left and stack them into a batch.

    With padding on the left, generation continues every row in the same column.

    Args:
        examples: encoded examples; packed ones have "position_ids".
        pad: id of the padding token.

    Returns:
        Input ids, attention mask and labels, and position ids if all examples have them: int64,
        each (examples, longest example). The mask of packed examples says where padding is; the
        model does not get it, as it keeps samples apart by their positions alone. Padding has
        positions of its own, like a further sample.
    """
    width = max(len(e["input_ids"]) for e in examples)
    packed = all("position_ids" in e for e in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    rows |= {"position_ids": []} if packed else {}
    for e in examples:
        gap = width - len(e["input_ids"])
        rows["input_ids"].append([pad] * gap + e["input_ids"])
        rows["attention_mask"].append([0] * gap + [1] * len(e["input_ids"]))
        rows["labels"].append([IGNORE] * gap + e["labels"])
        if packed:
            rows["position_ids"].append([*range(gap), *e["position_ids"]])
    return {key: torch.tensor(value) for key, value in rows.items()}


def take_rows(batch: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return rows of a batch of `collate`, without the columns that are padding in all of them."""
    columns = batch["attention_mask"][rows].any(0)
    return {key: value[rows][:, columns] for key, value in batch.items()}
