"""The parameters of an optimizer, and all that a refused call must leave as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers.bits import bits
from torch import Tensor, nn

from lift_kernels import LiftAdamW


@dataclass(eq=False)
class Trained:
    """A parameter of the optimizer.

    Attributes:
        p: the parameter.
        name: of its weight in the plain model.
        group: its options.
        layers: packed layers that hold it as their ``values``.
        mask: index list at the last look.
        m, v, births: of all entries of the matrix; zero outside the mask.
        steps: updates of it.
        rank, density, budget_rank: of the next mask, as the group's; the first one may differ.
    """

    p: Tensor
    name: str
    group: dict[str, Any]
    layers: list[nn.Module]
    mask: Tensor | None = None
    m: Tensor = field(default_factory=lambda: torch.zeros(0))
    v: Tensor = field(default_factory=lambda: torch.zeros(0))
    births: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: int = 0

    @property
    def matrix(self) -> Tensor:
        return (self.layers[0].weight if self.layers else self.p).detach()

    @property
    def hooked(self) -> bool:
        return getattr(self.p, "lift_indices", None) is not None

    @property
    def packed(self) -> bool:
        return bool(self.layers) or self.hooked

    @property
    def sparse(self) -> bool:
        if self.packed:
            return True
        return self.p.dim() == 2 if self.group["lift"] is None else self.group["lift"]

    def gradient(self) -> Tensor | None:
        """What waits for a step: dense and flat, or packed."""
        grad = self.p.lift_grad if self.hooked else self.p.grad
        return None if grad is None else grad.detach().flatten()

    def dense_gradient(self) -> Tensor | None:
        """The same at all entries; zero where it is not known."""
        grad = self.gradient()
        if grad is None or not self.packed:
            return grad
        indices = self.layers[0].indices if self.layers else self.p.lift_indices
        dense = torch.zeros(self.matrix.numel(), dtype=grad.dtype)
        dense[indices.long()] = grad
        return dense


def snapshot(model: nn.Module, optimizer: LiftAdamW | None) -> dict[str, Any]:
    """All that a refused call must leave as it is."""
    taken: dict[str, Any] = {}
    for name, module in model.named_modules():
        taken[f"class of {name}"] = type(module).__name__
    for name, p in model.named_parameters():
        taken[f"weight {name}"] = "meta" if p.is_meta else bits(p.detach()).clone()
        taken[f"required {name}"] = p.requires_grad
        taken[f"id {name}"] = id(p)
        for kind in ("grad", "lift_grad"):
            g = getattr(p, kind, None)
            taken[f"grad {name} {kind}"] = None if g is None else bits(g.detach().to_dense()).clone()
    for number, group in enumerate(optimizer.param_groups if optimizer else ()):
        for key, value in group.items():
            if key not in ("params", "differentiable"):  # torch adds that to loaded groups
                taken[f"option {number} {key}"] = copy.deepcopy(value)
        for i, p in enumerate(group["params"]):
            for key, value in optimizer.state.get(p, {}).items():
                taken[f"state {number}.{i} {key}"] = bits(value.detach()).clone()
    return taken


def assert_same(before: dict[str, Any], after: dict[str, Any], label: str, leave: tuple[str, ...] = ()) -> None:
    keys = [key for key in {**before, **after} if not key.startswith(leave)] if leave else {**before, **after}
    for key in keys:
        assert key in before and key in after, f"{label}{key} is only on one side"
        a, b = before[key], after[key]
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        assert same, f"{label}{key} differs: {a} and {b}"
