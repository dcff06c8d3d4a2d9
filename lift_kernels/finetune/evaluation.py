"""Losses of a model on encoded samples, and the neutral text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .forward import form_of, logits_at
from .prompts import IGNORE, Example, collate, opening

# Prose without arithmetic. A rise of its loss shows how much the model forgot in fine-tuning.
NEUTRAL_TEXT = (
    "The river rises in the hills north of the town and flows slowly through wide meadows before it reaches the sea. "
    "In spring, when the snow melts, it often floods the fields along its banks. Farmers have learned to live with "
    "the water: they build their houses on small mounds and keep boats in their barns. In summer the same fields are "
    "dry, and cows graze where fish were swimming a few weeks earlier.",
    "Bread is one of the oldest prepared foods. The dough is made from flour, water, salt and yeast, and it has to "
    "rest in a warm place so that it can rise. While the yeast feeds on the sugars in the flour, it releases gas, "
    "which is trapped in the dough and makes it soft. A hot oven then turns the outside into a brown crust while the "
    "inside stays moist.",
    "The museum opened its new wing last week with an exhibition about the history of photography. Visitors can see "
    "early cameras made of wood and brass, portraits of people who had to sit still for minutes, and the first "
    "pictures taken from the air. The curator said that she wanted to show how a difficult craft became something "
    "that everybody does without thinking about it.",
    "A computer program is a list of instructions that a machine can follow. Programmers write it in a language that "
    "people can read, and a compiler translates it into the simple operations of the processor. Most of the work, "
    "however, is not writing but reading: before changing a program one has to understand what it does, why it does "
    "it that way, and who depends on it.",
)


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
        batch: input ids, attention mask and labels, each (rows, tokens), as from `collate`.

    Returns:
        The losses in nats, fp32 (rows,) with a gradient, and the labelled tokens, int64 (rows,).
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    if not form_of(model).padding and not mask.all():
        rows = [{key: value[i : i + 1, mask[i] == 1] for key, value in batch.items()} for i in range(len(mask))]
        losses, counts = zip(*(row_losses(model, row) for row in rows), strict=True)
        return torch.cat(losses), torch.cat(counts)
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    logits = logits_at(model, batch["input_ids"], mask, columns - 1)
    target = labels[:, columns]
    loss = cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
    return loss.view(target.shape).sum(1), (target != IGNORE).sum(1)


def mean_loss(model, tokenizer, examples: Sequence[Example], batch_size: int, title: str) -> float:
    """Return the mean cross-entropy of examples in nats per labelled token; see `sample_losses`."""
    losses = sample_losses(model, tokenizer, examples, batch_size, title)
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


@torch.no_grad()
def sample_losses(
    model, tokenizer, examples: Sequence[Example], batch_size: int, title: str
) -> list[tuple[float, int]]:
    """Return the summed cross-entropy (nats) and the number of labelled tokens of each example.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        examples: encoded examples.
        batch_size: examples per batch.
        title: text of the progress bar.
    """
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    losses = [(0.0, 0)] * len(examples)
    for start in tqdm(range(0, len(order), batch_size), desc=title, unit="batch"):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id)
        totals, counts = row_losses(model, {k: v.to(model.device) for k, v in batch.items()})
        for i, total, count in zip(chosen, totals.tolist(), counts.tolist(), strict=True):
            losses[i] = total, count
    return losses


def neutral_examples(tokenizer) -> list[Example]:
    """Return NEUTRAL_TEXT as examples in which all tokens but the first are labelled."""
    start = opening(tokenizer)
    encoded = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in NEUTRAL_TEXT]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in encoded]
