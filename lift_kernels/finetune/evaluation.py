"""Losses, greedy answers and exact match of a model on question/answer problems."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache

from .prompts import IGNORE, Example, collate, opening, prompt

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
    part of the work.

    Args:
        model: a causal language model.
        batch: input ids, attention mask and labels, each (rows, tokens), as from `collate`.

    Returns:
        The loss in nats, a scalar with a gradient, and the number of labelled tokens.
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    columns = (labels != IGNORE).any(0).nonzero()[:, 0]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=columns - 1,
        use_cache=False,
    ).logits
    target = labels[:, columns].flatten()
    loss = cross_entropy(logits.flatten(0, 1).float(), target, ignore_index=IGNORE, reduction="sum")
    return loss, int((target != IGNORE).sum())


@torch.no_grad()
def mean_loss(model, tokenizer, examples: Sequence[Example], batch_size: int, title: str) -> float:
    """Return the mean cross-entropy of examples in nats per labelled token.

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
    return total / count


def neutral_examples(tokenizer) -> list[Example]:
    """Return NEUTRAL_TEXT as examples in which all tokens but the first are labelled."""
    start = opening(tokenizer)
    encoded = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in NEUTRAL_TEXT]
    return [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in encoded]


@dataclass(frozen=True)
class _PrefixCache:
    """Key-value cache of a token prefix that every batch of prompts continues."""

    length: int
    cache: DynamicCache
    argument: str  # the model's name for its cache argument

    def repeat(self, rows: int) -> dict[str, DynamicCache]:
        """Return a copy for a batch of so many rows, as an argument of the model."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return {self.argument: cache}


def _cache_prefix(model, prefix: list[int]) -> _PrefixCache:
    """Run a prefix (token ids) through the model once."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft hides the signature
    # transformers is renaming the argument, so that both names have to work.
    argument = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prefix], device=model.device)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{argument: cache})
    return _PrefixCache(len(prefix), cache, argument)


def _stop_tokens(tokenizer, device: torch.device) -> torch.Tensor:
    """Return the ids of the end-of-text token and of every token with a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    newlines = [i for i, text in enumerate(texts) if "\n" in text]
    return torch.tensor([*newlines, tokenizer.eos_token_id], device=device)


def _continue_greedily(
    model, batch: dict[str, torch.Tensor], prefix: _PrefixCache, stops: torch.Tensor, pad: int, max_new_tokens: int
) -> torch.Tensor:
    """Continue the prompts of a batch until each row has a stop token.

    Args:
        model: a causal language model.
        batch: prompts without the prefix, padded on the left, as from `collate`.
        prefix: cache of the tokens in front of every prompt.
        stops: ids of the tokens that end a row.
        pad: id of the token that fills a row after its end.
        max_new_tokens: most tokens of a row.

    Returns:
        The new token ids, (rows, new tokens).
    """
    device, rows = model.device, len(batch["input_ids"])
    ids = batch["input_ids"].to(device)
    mask = torch.cat([torch.ones(rows, prefix.length, dtype=torch.long), batch["attention_mask"]], 1).to(device)
    positions = (mask.cumsum(-1) - 1)[:, prefix.length :]
    cache = prefix.repeat(rows)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    written = []
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **cache,
        )
        ids = out.logits[:, -1].argmax(-1, keepdim=True).masked_fill(done[:, None], pad)
        done |= torch.isin(ids[:, 0], stops)
        written.append(ids)
        if done.all():
            break
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


@torch.no_grad()
def greedy_answers(
    model, tokenizer, questions: Sequence[str], prefix: list[int], max_new_tokens: int, batch_size: int, title: str
) -> list[str]:
    """Answer questions by greedy decoding after a common prefix.

    The prefix runs through the model once. Every batch continues a copy of its key-value cache.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: questions to answer.
        prefix: token ids in front of every prompt.
        max_new_tokens: most tokens of an answer.
        batch_size: questions per batch.
        title: text of the progress bar.

    Returns:
        One answer per question, up to the first newline.
    """
    model.eval()
    cached, stops = _cache_prefix(model, prefix), _stop_tokens(tokenizer, model.device)
    encoded = [tokenizer(prompt(q), add_special_tokens=False)["input_ids"] for q in questions]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    with tqdm(total=len(encoded), desc=title, unit="problem") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([{"input_ids": encoded[i], "labels": encoded[i]} for i in chosen], tokenizer.pad_token_id)
            new = _continue_greedily(model, batch, cached, stops, tokenizer.pad_token_id, max_new_tokens)
            for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.split("\n")[0].strip()
            bar.update(len(chosen))
    return answers
