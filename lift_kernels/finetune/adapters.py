"""Methods of peft: LoRA and SHiRA adapters at the linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..nn.weight_kinds import LINEAR, Weight, is_linear
from .config import Settings
from .trained import chosen_by_name

LORA_RANK = 16


def add_adapter(model: Any, weights: Sequence[Weight], settings: Settings) -> tuple[Any, list[torch.Tensor]]:
    """Put an adapter at each linear layer that ``include`` and ``exclude`` leave.

    Args:
        model: the plain model; it is changed in place.
        weights: what its weights are.
        settings: options of the run; the method is lora or shira.

    Returns:
        The peft wrapper, and the weights that the adapters change.

    Raises:
        UserError: when peft is missing or cannot adapt the model, and when no layer is left.
    """
    covered = [w.parameter for w in chosen_by_name([w for w in weights if w.kind == LINEAR], settings, "linear weight")]
    wanted = set(map(id, covered))
    targets = [name for name, m in model.named_modules() if is_linear(m) and id(m.weight) in wanted]
    try:
        from peft import get_peft_model

        config = _config(targets, [tuple(p.shape) for p in covered], settings)
    except ImportError as error:
        raise UserError(f"method {settings.method} needs the package peft; run `pip install peft`") from error
    try:
        return get_peft_model(model, config), list(covered)
    except (ValueError, TypeError) as error:  # such as for Mamba
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(f"peft cannot adapt a {type(model).__name__}: {reason}; use --method lift") from error


def _config(targets: list[str], shapes: Sequence[tuple[int, ...]], settings: Settings) -> Any:
    """Return peft's configuration of an adapter."""
    if settings.method == "lora":
        from peft import LoraConfig

        return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)
    from peft import ShiraConfig

    torch.sparse.check_sparse_tensor_invariants.disable()  # as by default; said here, torch does not warn of it
    return ShiraConfig(r=shira_rank(shapes, settings), random_seed=settings.seed, target_modules=targets)


def shira_rank(shapes: Iterable[Sequence[int]], settings: Settings) -> int:
    """Return the r with which SHiRA trains as many entries as the other sparse methods, nearly.

    SHiRA trains r (m + n) entries of each m x n matrix, with one r for all of them. So the entries
    of all matrices together come near the density, and the share of each depends on its shape.

    Args:
        shapes: (m, n) of each matrix.
        settings: options of the run; ``budget_rank`` is an r.

    Raises:
        UserError: when a matrix has fewer entries than that.
    """
    shapes = list(shapes)
    total, sides = sum(m * n for m, n in shapes), sum(m + n for m, n in shapes)
    r = settings.budget_rank or max(1, round(settings.density * total / sides))
    for m, n in shapes:
        if r * (m + n) > m * n:
            option = "--budget-rank" if settings.budget_rank else "--density"
            raise UserError(
                f"method shira trains r (rows + columns) entries of a matrix, here with r = {r}, and one of {m} x {n} "
                f"has fewer; lower {option}"
            )
    return r


def adapter_entries(model: nn.Module) -> dict[int, int]:
    """Return how many numbers of adapters are trained, by the id of the weight that they change."""
    found = {}
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Module):
            found[id(base.weight)] = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return found
