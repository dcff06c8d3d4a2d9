"""Greedy answers of a model to questions that follow the same worked examples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .forward import Form, base_of, explained, form_of, positions_of
from .prompts import collate


@torch.no_grad()
def greedy_answers(
    model, tokenizer, asked: Sequence[list[int]], prefix: list[int], max_new_tokens: int, batch_size: int, title: str
) -> list[str]:
    """Answer prompts by greedy decoding after a common prefix.

    Where the model allows it, the prefix runs through the model once, and every batch continues a
    copy of its key-value cache. Other models read the prefix in front of every question. A model
    that reads padding as input answers one question at a time.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        asked: token ids of the prompts.
        prefix: token ids in front of every prompt.
        max_new_tokens: most tokens of an answer.
        batch_size: questions per batch.
        title: text of the progress bar.

    Returns:
        One answer per prompt, up to the first newline.
    """
    model.eval()
    form, stops = form_of(model), _stop_tokens(tokenizer, model.device)
    encoded = list(asked)
    cached = _cache_prefix(model, form, prefix, max(map(len, encoded), default=0) + max_new_tokens)
    if cached is None:
        encoded = [prefix + ids for ids in encoded]
    batch_size = batch_size if form.padding else 1
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    with tqdm(total=len(encoded), desc=title, unit="problem") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([{"input_ids": encoded[i], "labels": encoded[i]} for i in chosen], tokenizer.pad_token_id)
            if cached is None:
                new = _generate(model, form, batch, stops, tokenizer.pad_token_id, max_new_tokens)
            else:
                new = _continue_prefix(model, form, batch, cached, stops, tokenizer.pad_token_id, max_new_tokens)
            for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.split("\n")[0].strip()
            bar.update(len(chosen))
    return answers


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


def _cache_prefix(model, form: Form, prefix: list[int], further: int) -> _PrefixCache | None:
    """Run a prefix (token ids) through the model once.

    Returns:
        Its cache, or None where ``further`` tokens after it, padding between them included, would
        not see what they see in one text without padding.
    """
    if form.cache is None or not form.padding or not {"attention_mask", "position_ids"} <= form.arguments:
        return None
    cache = DynamicCache(config=model.config)
    if not _sees_all(cache, model.config, len(prefix) + further):
        return None
    ids = torch.tensor([prefix], device=model.device)
    model(input_ids=ids, **form.accepted(use_cache=True, logits_to_keep=1), **{form.cache: cache})
    return _PrefixCache(len(prefix), cache, form.cache)


def _sees_all(cache: DynamicCache, config: Any, tokens: int) -> bool:
    """Return whether each layer attends to all earlier tokens of so long a text.

    A window counts padding between prefix and prompt, and a recurrent layer reads it.
    """
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return False
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    windows.append(getattr(config, "window_size", tokens))  # GPT-Neo's, which its cache does not know
    return min(windows) >= tokens


def _stop_tokens(tokenizer, device: torch.device) -> torch.Tensor:
    """Return the ids of the end-of-text token and of every token with a newline."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    newlines = [i for i, text in enumerate(texts) if "\n" in text]
    return torch.tensor([*newlines, tokenizer.eos_token_id], device=device)


def _continue_prefix(
    model,
    form: Form,
    batch: dict[str, torch.Tensor],
    prefix: _PrefixCache,
    stops: torch.Tensor,
    pad: int,
    max_new_tokens: int,
) -> torch.Tensor:
    """Continue the prompts of a batch until each row has a stop token.

    Args:
        model: a causal language model.
        form: how it is called.
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
    positions = positions_of(mask)[:, prefix.length :]
    options = form.accepted(use_cache=True, logits_to_keep=1) | prefix.repeat(rows)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    written = []
    for _ in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)
        ids = out.logits[:, -1].argmax(-1, keepdim=True).masked_fill(done[:, None], pad)
        done |= torch.isin(ids[:, 0], stops)
        written.append(ids)
        if done.all():
            break
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        positions = positions[:, -1:] + 1
    return torch.cat(written, 1)


def _generate(
    model, form: Form, batch: dict[str, torch.Tensor], stops: torch.Tensor, pad: int, max_new_tokens: int
) -> torch.Tensor:
    """Continue whole prompts by transformers' ``generate``; arguments are as above."""
    base = base_of(model)
    # The model's own settings may sample, or penalize words, even where a call names others.
    kept = base.generation_config
    base.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops.tolist(), pad_token_id=pad
    )
    try:
        mask = form.accepted(attention_mask=batch["attention_mask"].to(base.device))
        with explained(model):
            out = base.generate(batch["input_ids"].to(base.device), **mask)
    finally:
        base.generation_config = kept
    return out[:, batch["input_ids"].shape[1] :]
