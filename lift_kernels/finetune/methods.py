"""Model and optimizer of each fine-tuning method: lift, random, lora and full."""

from __future__ import annotations

from typing import Any

import torch

from .._storage import storage_bytes
from ..errors import UserError
from ..nn.packing import pack_gradients
from ..nn.param_groups import lift_param_groups
from ..optim.lift_adamw import LiftAdamW
from .config import LEARNING_RATES, Settings
from .timing import Clock

BETAS = (0.9, 0.95)  # as in the LIFT paper
CLIP_NORM = 1.0  # largest norm of the gradient over the trained entries
LORA_RANK = 16


def prepare(model, settings: Settings, clock: Clock):
    """Prepare a model for a method.

    Args:
        model: the loaded model; it is changed in place.
        settings: options of the run.
        clock: receives the time of the first mask.

    Returns:
        The model to train, its optimizer, and the weight matrices that the method adapts in whole
        or in part. For lora the model is a peft wrapper.

    Raises:
        ValueError: for an option that does not fit the model's matrices, and for non-finite
            weights.
        UserError: when a package is missing.
    """
    lr = settings.lr or LEARNING_RATES[settings.method]
    groups = lift_param_groups(model, freeze_rest=settings.method != "full")
    covered = [p for group in groups for _, p in group["params"]]
    if settings.method in ("lift", "random"):
        print(f"choosing the entries to train in {len(covered)} matrices", flush=True)
        selection = "random" if settings.method == "random" else "principal"
        budget: dict[str, Any] = (
            {"budget_rank": settings.budget_rank} if settings.budget_rank else {"density": settings.density}
        )
        if settings.gradients == "packed":
            options = {"rank": settings.rank, "selection": selection, "seed": settings.seed, **budget}
            groups = clock.first_mask(lambda: pack_gradients(model, **options))
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
            **budget,
        )
        if settings.gradients == "dense":
            clock.first_mask(optimizer.refresh)
        else:
            optimizer.refresh()  # adopts the existing masks
        return model, optimizer, covered
    if settings.method == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UserError("method lora needs the package peft; run `pip install peft`") from error
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
        model = get_peft_model(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
    else:
        trained = covered = list(model.parameters())
    return model, torch.optim.AdamW(trained, lr=lr, betas=BETAS, weight_decay=0.0, fused=True), covered


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all state that an optimizer keeps for its parameters."""
    if isinstance(optimizer, LiftAdamW):
        return optimizer.state_bytes()
    return storage_bytes(t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def trained_entries(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of entries that an optimizer changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, LiftAdamW):
        return sum(optimizer.state[p]["indices"].numel() for p in parameters)
    return sum(p.numel() for p in parameters)
