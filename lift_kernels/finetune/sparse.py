"""Masks and optimizer of the methods that train chosen entries of each matrix."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..masks.block_selections import principal_blocks, principal_runs, random_runs
from ..nn.packing import pack_gradients
from ..nn.param_groups import lift_param_groups, pattern_of, stacked_weights
from ..nn.weight_kinds import LINEAR, weights_of
from ..optim.lift_adamw import LiftAdamW
from . import prompts
from .config import BETAS, CLIP_NORM, DTYPES, FIXED, MASTERS, STATE_DTYPES, Settings
from .data import RunData
from .evaluation import answer_loss
from .forward import bypassed_layers
from .parallel import Ranks
from .precision import autocast
from .timing import Clock

GRADIENT_BATCHES = 4
"""Training batches whose gradient chooses the entries of method gradient."""


def selection_of(settings: Settings) -> str | Callable[..., Tensor]:
    """Return how LiftAdamW chooses the entries of a method, its option ``selection``."""
    others: dict[str, str | Callable[..., Tensor]] = {
        "lift": "principal",
        "blocks": principal_blocks(settings.rank),
        "runs": principal_runs(settings.rank),
        "random_runs": random_runs(settings.seed),
    }
    return others.get(settings.method, settings.method)


def sparse_optimizer(
    model: Any, tokenizer: Any, settings: Settings, data: RunData, lr: float, clock: Clock, ranks: Ranks
) -> LiftAdamW:
    """Choose the entries of a method, and return their optimizer.

    Args:
        model: the plain model; it is changed in place.
        tokenizer: its tokenizer.
        settings: options of the run; the method is one of SPARSE.
        data: training sequences, from whose gradients method gradient chooses.
        lr: peak learning rate.
        clock: receives the time of the first mask.
        ranks: the ranks that train the model together.

    Raises:
        ValueError: for an option that does not fit the model's matrices, and for non-finite
            weights.
        UserError: for layers of which no mask can be made.
    """
    print("choosing the entries to train", flush=True)
    packed = settings.gradients == "packed"
    bypassed = _bypassed_weights(model, settings) if packed else {}
    if bypassed and settings.method == "gradient":
        raise UserError("method gradient needs dense gradients for this model; take --gradients dense")
    rules = _rules(model, settings, bypassed)
    masks: dict[str, Any] = {"rank": settings.rank, "selection": selection_of(settings), "seed": settings.seed}
    masks["process_group"] = ranks.group
    budget = {"budget_rank": settings.budget_rank} if settings.budget_rank else {"density": settings.density}

    def choose() -> LiftAdamW:
        if settings.method == "gradient":
            add_gradients(model, tokenizer, settings, data, ranks)
        if packed:
            groups = pack_gradients(model, **masks, **budget, **rules, grad_dtype=DTYPES[settings.grad_dtype])
        else:
            groups = lift_param_groups(model, **rules)
        if bypassed:
            groups.append({"params": [(n, p.requires_grad_(True)) for n, p in bypassed.items()], "lift": True})
        optimizer = LiftAdamW(
            groups,
            lr=lr,
            betas=BETAS,
            refresh_interval=None if settings.method in FIXED else settings.refresh_interval or None,
            refresh_drift=(settings.refresh_drift or None) if settings.method == "lift" else None,
            max_grad_norm=CLIP_NORM,
            state_dtype=STATE_DTYPES[settings.state_dtype],
            master=MASTERS[settings.master],
            offload=None if settings.offload == "none" else settings.offload,
            warm_start=None,  # bases would enlarge the state by a quarter, and a run has few refreshes to speed up
            **masks,
            **budget,
        )
        if bypassed or not packed:
            optimizer.refresh()  # makes the masks of dense gradients
        return optimizer

    optimizer = clock.first_mask(choose)
    for p in model.parameters():
        p.grad = None  # of `add_gradients`
    return optimizer


def _rules(model: nn.Module, settings: Settings, bypassed: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Return which weights are trained, as options of `lift_param_groups`, without the bypassed."""
    include, exclude = settings.include, settings.exclude
    stacks = [
        name
        for name in stacked_weights(model)
        if (include is None or re.search(include, name)) and (exclude is None or not re.search(exclude, name))
    ]
    extra = pattern_of(stacks) if settings.extra is None else settings.extra
    if bypassed:
        exclude = "|".join(filter(None, (exclude, pattern_of(bypassed))))
    if bypassed and include is not None:  # a name must not match both
        linear = [w.name for w in weights_of(model) if w.kind == LINEAR and re.search(include, w.name)]
        include = pattern_of(name for name in linear if name not in bypassed)
        if not include:
            raise UserError(
                f"include is {settings.include!r}, and the model never calls the layers that it chooses; take "
                "--gradients dense"
            )
    return {"include": include, "exclude": exclude, "extra": extra or None, "freeze_rest": True}


def _bypassed_weights(model: Any, settings: Settings) -> dict[str, nn.Parameter]:
    """Return the weights to train of linear layers that the model never calls, and say so."""
    layers = set(bypassed_layers(model))
    include, exclude = settings.include, settings.exclude
    found = {
        w.name: w.parameter
        for w in weights_of(model)
        if w.kind == LINEAR
        and w.name.rpartition(".")[0] in layers
        and (include is None or re.search(include, w.name))
        and (exclude is None or not re.search(exclude, w.name))
    }
    if found:
        print(
            f"the model reads the weights of {len(found)} linear layers and never calls them, for example "
            f"{next(iter(found))}; their gradients stay dense"
        )
    return found


def add_gradients(model: Any, tokenizer: Any, settings: Settings, data: RunData, ranks: Ranks) -> None:
    """Put the gradient of the mean loss over the first training batches into ``p.grad``.

    Each rank computes its share of the sequences, and all get the sum. A matrix that they do not
    reach, such as that of an expert, gets zeros, and its mask is made of its first entries.
    """
    sequences = data.sequences[: GRADIENT_BATCHES * data.rows]
    tokens = sum(label != prompts.IGNORE for sequence in sequences for label in sequence["labels"])
    own, size = ranks.own(sequences), max(1, data.rows // settings.accumulation // ranks.count)
    training = model.training
    model.train()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):  # dropout draws numbers
        torch.manual_seed(settings.seed + ranks.number)
        for start in range(0, len(own), size):
            batch = prompts.collate(own[start : start + size], tokenizer.pad_token_id)
            with autocast(settings, model.device):
                loss, _ = answer_loss(model, {key: value.to(model.device) for key, value in batch.items()})
            (loss / tokens).backward()
    model.train(training)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = ranks.sum(torch.zeros_like(p) if p.grad is None else p.grad)
