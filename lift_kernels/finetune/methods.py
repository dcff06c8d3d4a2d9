"""Model and optimizer of each fine-tuning method: lift, random, lora and full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._storage import storage_bytes
from ..errors import UserError
from ..nn.packing import pack_gradients
from ..nn.param_groups import lift_param_groups, pattern_of, stacked_weights
from ..nn.trainable import trainable_of
from ..nn.weight_kinds import LINEAR, MATRICES, weights_of
from ..optim.lift_adamw import LiftAdamW
from .config import LEARNING_RATES, Settings
from .data import RunData
from .forward import bypassed_layers
from .timing import Clock

BETAS = (0.9, 0.95)  # as in the LIFT paper
CLIP_NORM = 1.0  # largest norm of the gradient over the trained entries
LORA_RANK = 16


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training.

    Attributes:
        model: the model to train. For lora it is a peft wrapper.
        optimizer: optimizer of the trained parameters.
        covered: weights that the method adapts, in whole or in part.
        share: their share of the model's matrices outside embeddings and head.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    covered: list[torch.Tensor]
    share: float


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
        UserError: when a package is missing.
    """
    lr = settings.lr or LEARNING_RATES[settings.method]
    weights = weights_of(model)
    if settings.method in ("lift", "random"):
        optimizer: torch.optim.Optimizer = _lift(model, settings, lr, clock, group)
        covered = [trainable_of(p).matrix for group in optimizer.param_groups for p in group["params"]]
    else:
        covered = [w.parameter for w in weights if settings.method == "full" or w.kind == LINEAR]
        if settings.method == "lora":
            model = _with_lora(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    matrices = {id(w.parameter): w.numel for w in weights if w.kind in MATRICES}
    share = sum(matrices.get(id(p), 0) for p in covered) / sum(matrices.values())
    print(_training_line(settings.method, covered, trained_entries(optimizer), share), flush=True)
    return Prepared(model, optimizer, covered, share)


def _lift(
    model, settings: Settings, lr: float, clock: Clock, group: torch.distributed.ProcessGroup | None
) -> LiftAdamW:
    """Choose the entries of methods lift and random, and return their optimizer."""
    print("choosing the entries to train", flush=True)
    selection = "random" if settings.method == "random" else "principal"
    budget: dict[str, Any] = (
        {"budget_rank": settings.budget_rank} if settings.budget_rank else {"density": settings.density}
    )
    extra = pattern_of(stacked_weights(model)) if settings.extra is None else settings.extra
    chosen: dict[str, Any] = {"extra": extra or None, "freeze_rest": True}
    bypassed: dict[str, torch.nn.Parameter] = {}
    if settings.gradients == "packed":
        options = {"rank": settings.rank, "selection": selection, "seed": settings.seed, **budget, **chosen}
        bypassed = _bypassed_weights(model)
        options["exclude"] = pattern_of(bypassed) or None
        groups = clock.first_mask(lambda: pack_gradients(model, process_group=group, **options))
        if bypassed:
            groups.append({"params": [(n, p.requires_grad_(True)) for n, p in bypassed.items()], "lift": True})
    else:
        groups = lift_param_groups(model, **chosen)
    optimizer = LiftAdamW(
        groups,
        lr=lr,
        betas=BETAS,
        rank=settings.rank,
        refresh_interval=settings.refresh_interval or None,
        refresh_drift=(settings.refresh_drift or None) if selection == "principal" else None,
        max_grad_norm=CLIP_NORM,
        selection=selection,
        warm_start=None,  # bases would enlarge the state by a quarter, and a run has few refreshes to speed up
        seed=settings.seed,
        process_group=group,
        **budget,
    )
    if settings.gradients == "dense":
        clock.first_mask(optimizer.refresh)
    elif bypassed:
        optimizer.refresh()  # makes the masks of those whose gradients stay dense
    return optimizer


def _bypassed_weights(model) -> dict[str, torch.nn.Parameter]:
    """Return the weights of linear layers that the model never calls, by name, and say so."""
    layers = set(bypassed_layers(model))
    found = {w.name: w.parameter for w in weights_of(model) if w.kind == LINEAR and w.name.rpartition(".")[0] in layers}
    if found:
        print(
            f"the model reads the weights of {len(found)} linear layers and never calls them, for example "
            f"{next(iter(found))}; their gradients stay dense"
        )
    return found


def _with_lora(model) -> Any:
    """Return the peft wrapper of a model, with an adapter at each linear layer."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("method lora needs the package peft; run `pip install peft`") from error
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # such as for Mamba
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(f"peft cannot adapt a {type(model).__name__}: {reason}; use --method lift") from error


def _training_line(method: str, covered: Sequence[torch.Tensor], entries: int, share: float) -> str:
    """Return what is trained, in one line. A stack counts as its matrices."""
    matrices, weights = sum(p.shape[:-2].numel() for p in covered if p.dim() > 1), sum(p.numel() for p in covered)
    of_model = f"{100 * share:.1f} % of the model's matrices outside embeddings and head"
    if method == "full":
        return f"training all {weights:,} weights"
    if method == "lora":
        return f"adapting {matrices} matrices of linear layers by {entries:,} numbers, {of_model}"
    further = "" if share == 1 else "; --extra REGEX trains further ones"
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, LiftAdamW):
        given = {p: trainable_of(p).indices for p in parameters}  # of packed gradients, from the start
        return sum((optimizer.state[p]["indices"] if i is None else i).numel() for p, i in given.items())
    return sum(p.numel() for p in parameters)
