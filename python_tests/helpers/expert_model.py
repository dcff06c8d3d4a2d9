"""A small model with every kind of parameter, and LiftAdamW over it in both modes.

It is used by tests and by the ranks that these start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients

MASKS: dict[str, Any] = {"rank": 6, "density": 0.1}
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "refresh_interval": 2, "refresh_drift": 0.6, **MASKS}
STEPS = 3, 4
"""Before a state is saved, and after it."""


class Experts(nn.Module):
    """A matrix whose masks start warm, small matrices, a stack, dense and idle parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = nn.Linear(264, 272)
        self.norm = nn.LayerNorm(272)
        self.down = nn.Linear(272, 20, bias=False)
        self.experts = nn.Parameter(0.1 * torch.randn(3, 20, 17))
        self.idle = nn.Linear(20, 18)
        self.frozen = nn.Linear(20, 18).requires_grad_(False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(self.norm(self.wide(x)).tanh())
        return torch.einsum("bi,eio->bo", hidden, self.experts).square().mean()


def build(
    mode: str, weights: int = 0, *, dtype: torch.dtype = torch.float32, backwards: bool = False, **options: Any
) -> tuple[Experts, LiftAdamW]:
    """A model and its optimizer.

    Args:
        mode: ``"matrix"`` or ``"packed"``.
        weights: the seed of these.
        backwards: groups and their parameters come in the opposite order.
        options: of LiftAdamW, over `OPTIONS`.
    """
    torch.manual_seed(weights)
    model = Experts(dtype)
    options = OPTIONS | options
    if mode == "packed":
        masks = {key: options.pop(key) for key in MASKS}
        groups = pack_gradients(model, extra="experts", **masks)
    else:
        groups = lift_param_groups(model, extra="experts")
    taken = {id(p) for group in groups for _, p in group["params"]}
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in taken and not _is_weight(model, name)]
    groups.append({"params": rest, "lift": False, "weight_decay": 0.0})
    if backwards:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    return model, LiftAdamW(groups, **options)


def _is_weight(model: nn.Module, name: str) -> bool:
    """Whether this is the weight of a packed layer, which its values train."""
    owner, _, last = name.rpartition(".")
    return last == "weight" and hasattr(model.get_submodule(owner), "values")


def train(model: nn.Module, optimizer: LiftAdamW, steps: range) -> None:
    """Steps with inputs that depend on their numbers alone."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(4, 264, generator=torch.Generator().manual_seed(step))
        model(x.to(dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()
