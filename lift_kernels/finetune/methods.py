"""Model and optimizer of each fine-tuning method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._storage import storage_bytes
from ..errors import UserError
from ..nn.trainable import trainable_of
from ..nn.weight_kinds import MATRICES, Weight, weights_of
from ..optim.lift_adamw import LiftAdamW
from .adapters import adapter_entries, add_adapter
from .config import ADAPTERS, BETAS, LEARNING_RATES, SPARSE, Settings
from .data import RunData
from .forward import base_of
from .parallel import Ranks
from .sparse import sparse_optimizer
from .timing import Clock
from .trained import Kind, by_kind, chosen_by_name


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training.

    Attributes:
        model: the model to train. For lora and shira it is a peft wrapper.
        optimizer: optimizer of the trained parameters.
        covered: weights that the method adapts, in whole or in part.
        share: their share of the model's matrices outside embeddings and head.
        kinds: what is trained and what is left out, by kind of layer.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    covered: list[torch.Tensor]
    share: float
    kinds: list[Kind]


def prepare(
    model,
    tokenizer,
    settings: Settings,
    data: RunData,
    clock: Clock,
    group: torch.distributed.ProcessGroup | None,
) -> Prepared:
    """Prepare a model for a method.

    Args:
        model: the loaded model; it is changed in place.
        tokenizer: its tokenizer.
        settings: options of the run.
        data: training sequences, from whose gradients a method may choose.
        clock: receives the time of the first mask.
        group: process group of the ranks that train the model together, or None.

    Raises:
        ValueError: for an option that does not fit the model's matrices, and for non-finite
            weights.
        UserError: for an option that does not fit the model, and when a package is missing.
    """
    lr = settings.lr or LEARNING_RATES[settings.method]
    weights = weights_of(model)
    if settings.checkpointing:
        _recompute_activations(model)
    if settings.method in SPARSE:
        optimizer: torch.optim.Optimizer = sparse_optimizer(model, tokenizer, settings, data, lr, clock, Ranks(group))
        covered = [trainable_of(p).matrix for group in optimizer.param_groups for p in group["params"]]
    else:
        if settings.method in ADAPTERS:
            model, covered = add_adapter(model, weights, settings)
        else:
            covered = _full(model, weights, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    matrices = {id(w.parameter): w.numel for w in weights if w.kind in MATRICES}
    share = sum(matrices.get(id(p), 0) for p in covered) / sum(matrices.values())
    entries = adapter_entries(model) if settings.method in ADAPTERS else _entries(optimizer)
    kinds = by_kind(weights, entries, settings)
    print(_training_line(settings, covered, kinds, share), flush=True)
    return Prepared(model, optimizer, covered, share, kinds)


def _recompute_activations(model: Any) -> None:
    """Let a model compute activations again in backward passes, in place of keeping them.

    Raises:
        UserError: for a model that cannot.
    """
    base = base_of(model)
    # transformers has renamed the method.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"{type(base).__name__} keeps its activations; leave out --checkpointing") from error


def _full(model: Any, weights: Sequence[Weight], settings: Settings) -> list[torch.Tensor]:
    """Freeze what include and exclude leave out, and return the other weights."""
    chosen = [w.parameter for w in chosen_by_name(weights, settings, "weight")]
    kept = set(map(id, chosen))
    for p in model.parameters():
        p.requires_grad_(id(p) in kept)
    return list(chosen)


def _training_line(settings: Settings, covered: Sequence[torch.Tensor], kinds: Sequence[Kind], share: float) -> str:
    """Return what is trained, in one line. A stack counts as its matrices."""
    matrices, weights = sum(p.shape[:-2].numel() for p in covered if p.dim() > 1), sum(p.numel() for p in covered)
    entries, every = sum(kind.trained for kind in kinds), sum(kind.weights for kind in kinds)
    of_model = f"{100 * share:.1f} % of the model's matrices outside embeddings and head"
    if settings.method == "full":
        return f"training all {weights:,} weights" if weights == every else f"training {weights:,} of {every:,} weights"
    if settings.method == "lora":
        return f"adapting {matrices} matrices of linear layers by {entries:,} numbers, {of_model}"
    all_linear = settings.method in SPARSE and settings.include is settings.exclude is None
    further = "; --extra REGEX trains further ones" if share < 1 and all_linear else ""
    return (
        f"training {100 * entries / weights:.3g} % of {matrices} matrices: {entries:,} of {weights:,} weights, "
        f"{of_model}{further}"
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all state that an optimizer keeps for its parameters."""
    if isinstance(optimizer, LiftAdamW):
        return optimizer.state_bytes()
    return storage_bytes(t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def trained_entries(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of entries that an optimizer changes."""
    return sum(_entries(optimizer).values())


def _entries(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Return how many entries of each matrix an optimizer changes, by the id of its parameter."""
    found = {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        kind = trainable_of(p)
        mask = kind.indices  # of packed gradients, from the start
        if mask is None and isinstance(optimizer, LiftAdamW):
            mask = optimizer.state[p]["indices"]
        found[id(kind.matrix)] = (p if mask is None else mask).numel()
    return found
