"""MatrixRef: one matrix of an optimizer: its options, its gradient, the place of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks.selection import SelectionRequest
from ..nn import trainable
from .hyperparameters import mask_size
from .packed_state import PackedState


@dataclass(slots=True, eq=False)
class MatrixRef:
    """A matrix that an optimizer trains.

    Attributes:
        number: its place among all parameters that LIFT trains.
        draw_number: what random masks are drawn by: its place in `pack_gradients`, else ``number``.
        parameter, group, name: the parameter, its group, and its name for messages.
        trainable: where its gradient is, and its matrix.
        arena, row: where its state is; None and -1 before the first mask.
        warm: ``basis`` and ``threshold`` of its last mask, for a warm start.
        drift: what `drift` keeps, where the group bounds the drift of masks.
    """

    number: int
    parameter: Tensor
    group: dict[str, Any]
    name: str
    trainable: trainable.Trainable
    arena: PackedState | None = None
    row: int = -1
    draw_number: int = 0
    warm: dict[str, Tensor] = field(default_factory=dict)
    drift: dict[str, Tensor] = field(default_factory=dict)

    def request(self) -> SelectionRequest:
        """What the next mask is made from."""
        matrix = self.trainable.matrix.detach()
        grad = self.parameter.grad if self.parameter.shape == matrix.shape else None
        rank, k = mask_size(matrix, self.group, self.name)
        return SelectionRequest(matrix, grad, rank, k, self.name, self.draw_number, self.warm)

    def check_renewable(self, drop_gradients: bool) -> None:
        """Raise if another optimizer, or a gradient that is kept, forbids a new mask."""
        other = next((layer.stepped_by for layer in self.trainable.layers if layer.stepped_by), None)
        if other is not None:
            raise RuntimeError(
                f"{self.name} is trained by {other} too, whose state would belong to other entries after a refresh; "
                "train it by LiftAdamW alone"
            )
        if not drop_gradients and self.trainable.pending:
            raise RuntimeError(
                f"{self.name} has a packed gradient, whose entries a refresh would exchange; refresh after step() and "
                "zero_grad(), or by refresh(drop_gradients=True)"
            )

    def views(self) -> dict[str, Tensor]:
        """Views of its state (`PackedState.views`)."""
        assert self.arena is not None, f"{self.name} has no mask yet"
        return self.arena.views(self.row)

    def entries(self) -> int:
        """How many entries its mask has."""
        assert self.arena is not None, f"{self.name} has no mask yet"
        return self.arena.counts[self.row]

    def kind(self) -> tuple[torch.device, torch.dtype, torch.dtype | str, str | None, bool, str | None]:
        """Device, weight dtype, form and place of state: those of one kind share an arena."""
        matrix, group = self.trainable.matrix, self.group
        form = group["state_dtype"], master_form(self.trainable, group), group["bias_correction"] == "per_entry"
        return matrix.device, matrix.dtype, *form, group.get("offload")


def master_form(kind: trainable.Trainable, group: dict[str, Any]) -> str | None:
    """How the state of a matrix holds the fp32 values of its entries: "fp32", "split" or not.

    fp32 ``values`` of a packed layer are a view of the masters, so there are some beside fp32
    weights, too.
    """
    viewed, dtype = kind.packed and kind.parameter.dtype == torch.float32, kind.matrix.dtype
    if group["master"] == "split" and dtype != torch.bfloat16:  # The option came with a loaded state.
        return "fp32" if viewed or dtype != torch.float32 else None
    return group["master"] if viewed or dtype != torch.float32 else None


class DenseRef(NamedTuple):
    """A parameter that torch's AdamW trains."""

    parameter: Tensor
    group: dict[str, Any]
    name: str


def names_of(group: dict[str, Any], number: int) -> list[str]:
    """Names of the parameters of a group for messages; ``number`` is that of the group."""
    return group.get("param_names") or [
        trainable.trainable_of(p).name or f"parameter {i} of group {number}" for i, p in enumerate(group["params"])
    ]


def parameters_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [p for group in groups for p in group["params"]]
