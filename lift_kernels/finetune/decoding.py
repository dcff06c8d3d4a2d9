"""Greedy answers of a model to questions, and the losses of answers to choose from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .evaluation import row_losses
from .forward import Form, base_of, explained, form_of, positions_of
from .prompts import IGNORE, collate

CACHED_TOKENS = 2**17
"""Most tokens of a batch, whose keys and values are kept."""


@torch.no_grad()
def greedy_answers(
    model,
    tokenizer,
    asked: Sequence[list[int]],
    prefix: list[int],
    max_new_tokens: int,
    batch_size: int,
    title: str,
    ends: Sequence[int] | None = None,
) -> list[str]:
    """Answer prompts by greedy decoding after a common prefix, which may be empty.

    Where the model allows it, the prefix runs through the model once, and every batch continues a
    copy of its key-value cache. Other models read the prefix in front of every question. A model
    that reads padding as input answers one question at a time.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        asked: token ids of the prompts.
        prefix: token ids in front of every prompt.
        max_new_tokens: most tokens of an answer.
        batch_size: most questions per batch; see CACHED_TOKENS too.
        title: text of the progress bar.
        ends: ids of the tokens that end an answer, as from `end_tokens`. None ends it with its
            line.

    Returns:
        One answer per prompt, without white space around it.
    """
    model.eval()
    form = form_of(model)
    stops = torch.tensor(_line_ends(model, tokenizer) if ends is None else ends, device=model.device)
    encoded = list(asked)
    further = max(map(len, encoded), default=0) + max_new_tokens
    cached = _cache_prefix(model, form, prefix, further)
    if cached is None:
        encoded = [prefix + ids for ids in encoded]
    batch_size = max(1, min(batch_size, CACHED_TOKENS // (len(prefix) + further))) if form.padding else 1
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
            for i, row in zip(chosen, new.tolist(), strict=True):
                if ends is None:
                    answers[i] = tokenizer.decode(row, skip_special_tokens=True).split("\n")[0].strip()
                else:
                    row = row[: next((j for j, token in enumerate(row) if token in ends), None)]
                    answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
            bar.update(len(chosen))
    return answers


@torch.no_grad()
def choice_losses(
    model, tokenizer, asked: Sequence[list[int]], prefix: list[int], choices: Sequence[list[int]], title: str
) -> list[list[float]]:
    """Return the loss of each of the same choices as the answer to each prompt.

    Where the model allows it, a prompt runs through the model once, and the choices continue it.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: its tokenizer.
        asked: token ids of the prompts.
        prefix: token ids in front of every prompt.
        choices: token ids of the answers.
        title: text of the progress bar.

    Returns:
        For each prompt the losses of the choices, in nats, summed over their tokens.
    """
    model.eval()
    form, longest = form_of(model), max(map(len, choices))
    shared = _cache_prefix(model, form, prefix, max(map(len, asked), default=0) + longest)
    losses = []
    for ids in tqdm(asked, desc=title, unit="problem"):
        whole = prefix + ids
        # The last token of the prompt predicts the first one of the answer, so it stays out.
        cached = _cache_prefix(model, form, (ids if shared else whole)[:-1], longest + 1, shared)
        seen = whole if cached is None else ids[-1:]
        rows = [{"input_ids": seen + choice, "labels": [IGNORE] * len(seen) + choice} for choice in choices]
        batch = {key: value.to(model.device) for key, value in collate(rows, tokenizer.pad_token_id).items()}
        losses.append(
            (row_losses(model, batch)[0] if cached is None else _losses_after(model, form, batch, cached)).tolist()
        )
    return losses


def _losses_after(model, form: Form, batch: dict[str, torch.Tensor], prefix: _PrefixCache) -> torch.Tensor:
    """Return the summed losses of rows that continue a prefix, by labels; see `row_losses`."""
    rows = len(batch["input_ids"])
    mask = torch.cat([batch["attention_mask"].new_ones(rows, prefix.length), batch["attention_mask"]], 1)
    positions = positions_of(mask)[:, prefix.length :]
    options = form.accepted(use_cache=True) | prefix.repeat(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, **options).logits
    target = batch["labels"][:, 1:]
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), ignore_index=IGNORE, reduction="none")
    return loss.view(target.shape).sum(1)


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


def _cache_prefix(
    model, form: Form, prefix: list[int], further: int, shared: _PrefixCache | None = None
) -> _PrefixCache | None:
    """Run a prefix (token ids) through the model once, after a shared one.

    Returns:
        The cache of both, or None where the prefix is empty, or where ``further`` tokens after it,
        padding between them included, would not see what they see in one text without padding.
    """
    if not prefix or form.cache is None or not form.padding or not {"attention_mask", "position_ids"} <= form.arguments:
        return None
    cache = copy.deepcopy(shared.cache) if shared else DynamicCache(config=model.config)
    start = shared.length if shared else 0
    length = start + len(prefix)
    if not _sees_all(cache, model.config, length + further):
        return None
    ids = torch.tensor([prefix], device=model.device)
    mask = torch.ones(1, length, dtype=torch.long, device=model.device)
    options = form.accepted(use_cache=True, logits_to_keep=1) | {form.cache: cache}
    model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)[:, start:], **options)
    return _PrefixCache(length, cache, form.cache)


def _sees_all(cache: DynamicCache, config: Any, tokens: int) -> bool:
    """Return whether each layer attends to all earlier tokens of so long a text.

    A window counts padding between prefix and prompt, and a recurrent layer reads it.
    """
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return False
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    windows.append(getattr(config, "window_size", tokens))  # GPT-Neo's, which its cache does not know
    return min(windows) >= tokens


def _line_ends(model, tokenizer) -> list[int]:
    """Return the ids of every token with a newline, and those that end a text."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [*(i for i, text in enumerate(texts) if "\n" in text), *end_tokens(model, tokenizer)]


def end_tokens(model, tokenizer, completions: Sequence[list[int]] = ()) -> list[int]:
    """Return the ids of the tokens that end an answer.

    These are the end-of-text token of the tokenizer, what the model's settings of generation name,
    and a special token at the end of completions, such as a chat template's end of turn.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        completions: token ids of whole answers.
    """
    settings = getattr(base_of(model), "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])} - {None}
    added = tokenizer.added_tokens_decoder
    for ids in completions:
        # White space may follow the token.
        last = next((i for i in reversed(ids) if i in added or tokenizer.decode([i]).strip()), None)
        ends |= {last} & added.keys()
    return sorted(ends)


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
