"""Losses of a model on encoded samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .forward import form_of, logits_at
from .neutral import neutral_pieces
from .prompts import IGNORE, Example, collate

LABELLED = 2048
"""Most labelled tokens of a batch. Each of them takes logits of the whole vocabulary."""


def answer_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy of the labelled tokens of a batch, and their number.

    Returns:
        The loss in nats, a scalar with a gradient, and the number of labelled tokens.
    """
    losses, counts = row_losses(model, batch)
    return losses.sum(), int(counts.sum())


def row_losses(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross-entropy of the labelled tokens of each row, and their numbers.

    The head runs only on columns that some label needs. With a large vocabulary the head is a large
    part of the work. A model that reads padding as input gets one row at a time, without padding.

    Args:
        model: a causal language model.
        batch: input ids, attention mask and labels, and position ids of packed samples, each (rows,
            tokens), as from `collate`. The first token of a text has no label.

    Returns:
        The losses in nats, fp32 (rows,) with a gradient, and the labelled tokens, int64 (rows,).
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    if not form_of(model).padding and not mask.all():
        rows = [{key: value[i : i + 1, mask[i] == 1] for key, value in batch.items()} for i in range(len(mask))]
        losses, counts = zip(*(row_losses(model, row) for row in rows), strict=True)
        return torch.cat(losses), torch.cat(counts)
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    logits = logits_at(model, batch["input_ids"], mask, columns - 1, batch.get("position_ids"))
    target = labels[:, columns]
    loss = cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
    return loss.view(target.shape).sum(1), (target != IGNORE).sum(1)


@torch.no_grad()
def sample_losses(
    model, tokenizer, examples: Sequence[Example], batch_size: int, title: str
) -> list[tuple[float, int]]:
    """Return the summed cross-entropy (nats) and the number of labelled tokens of each example.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        examples: encoded examples.
        batch_size: most examples per batch; see LABELLED too.
        title: text of the progress bar.
    """
    model.eval()
    losses = [(0.0, 0)] * len(examples)
    with tqdm(total=len(examples), desc=title, unit="sample") as bar:
        for chosen in batches(examples, batch_size):
            batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id)
            totals, counts = row_losses(model, {k: v.to(model.device) for k, v in batch.items()})
            for i, total, count in zip(chosen, totals.tolist(), counts.tolist(), strict=True):
                losses[i] = total, count
            bar.update(len(chosen))
    return losses


def batches(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of examples of similar length that make a batch, at least one.

    Args:
        examples: encoded examples.
        batch_size: most examples of a batch; they have no more than LABELLED labelled columns.
    """
    batch: list[int] = []
    widest = 0
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"])):
        width = _width(examples[i])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * max(widest, width) > LABELLED):
            yield batch
            batch, widest = [], 0
        batch.append(i)
        widest = max(widest, width)
    if batch:
        yield batch


def _width(example: Example) -> int:
    """Return the memory that an example takes in a batch, in labelled tokens.

    The head runs from the first label to the end. Other tokens take a small part of its memory.
    """
    labels = example["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORE), 0)
    return max(len(labels) - first, len(labels) // 8)


def neutral_examples(tokenizer) -> list[Example]:
    """Return the built-in neutral text in pieces; see `neutral.neutral_pieces`."""
    return neutral_pieces(tokenizer)[1]
