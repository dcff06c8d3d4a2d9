"""Losses of a model on question/answer problems, and the numbers in its answers."""

from __future__ import annotations

import math
import re
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


def extract_number(text: str) -> float | None:
    """Return the final answer in a text, or None where it has no number.

    The final answer is the number that follows "####" or "answer is", else the last number.
    Thousands separators, decimals and signs are understood. Currency signs and markup in front of
    the number are skipped.
    """
    number = r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
    marked = re.findall(rf"(?:####|answer\s*(?:is|:|=))[^\w\n+-]*?({number})", text, flags=re.IGNORECASE)
    found = marked or re.findall(number, text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(text: str, expected: str) -> bool:
    """Return whether both texts have the same final number (relative tolerance 1e-6)."""
    found, wanted = extract_number(text), extract_number(expected)
    return found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's confidence interval of a proportion.

    Args:
        successes: number of successes.
        trials: number of trials.
        z: quantile of the normal distribution; the default gives 95 % confidence.

    Returns:
        Lower and upper bound; (0, 1) without trials.
    """
    if trials == 0:
        return 0.0, 1.0
    p, q = successes / trials, z * z / trials
    center = (p + q / 2) / (1 + q)
    half = math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    return max(0.0, center - half), min(1.0, center + half)


def answer_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy of the labelled tokens of a batch, and their number.

    The head runs only on columns that some label needs. With a large vocabulary the head is a large
    part of the work. A model that reads padding as input gets one row at a time, without padding.

    Args:
        model: a causal language model.
        batch: input ids, attention mask and labels, each (rows, tokens), as from `collate`.

    Returns:
        The loss in nats, a scalar with a gradient, and the number of labelled tokens.
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    if not form_of(model).padding and not mask.all():
        rows = [{key: value[i : i + 1, mask[i] == 1] for key, value in batch.items()} for i in range(len(mask))]
        losses, counts = zip(*(answer_loss(model, row) for row in rows), strict=True)
        return torch.stack(losses).sum(), sum(counts)
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    logits = logits_at(model, batch["input_ids"], mask, columns - 1)
    target = labels[:, columns].flatten()
    loss = cross_entropy(logits.flatten(0, 1).float(), target, ignore_index=IGNORE, reduction="sum")
    return loss, int((target != IGNORE).sum())


def mean_loss(model, tokenizer, examples: Sequence[Example], batch_size: int, title: str) -> float:
    """Return the mean cross-entropy of examples in nats per labelled token; see `summed_loss`."""
    total, count = summed_loss(model, tokenizer, examples, batch_size, title)
    return total / count


@torch.no_grad()
def summed_loss(model, tokenizer, examples: Sequence[Example], batch_size: int, title: str) -> tuple[float, int]:
    """Return the summed cross-entropy of examples in nats, and the number of labelled tokens.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        examples: encoded examples.
        batch_size: examples per batch.
        title: text of the progress bar.
    """
    model.eval()
    ordered = sorted(examples, key=lambda e: len(e["input_ids"]))
    total, count = 0.0, 0
    for start in tqdm(range(0, len(ordered), batch_size), desc=title, unit="batch"):
        batch = collate(ordered[start : start + batch_size], tokenizer.pad_token_id)
        loss, n = answer_loss(model, {k: v.to(model.device) for k, v in batch.items()})
        total, count = total + float(loss), count + n
    return total, count


def neutral_examples(tokenizer) -> list[Example]:
    """Return NEUTRAL_TEXT as examples in which all tokens but the first are labelled."""
    start = opening(tokenizer)
    encoded = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in NEUTRAL_TEXT]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in encoded]
