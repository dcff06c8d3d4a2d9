"""Hooks that pack the gradient of a parameter, for weights that no packed layer can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from . import trainable

_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # hooked parameter -> handle of its hook


def pack_on_accumulate(p: Tensor, indices: Tensor, number: int | None = None) -> None:
    """Pack the gradient of ``p`` from now on: its entries at ``indices`` go to ``p.lift_grad``.

    ``number`` is what random masks of ``p`` are drawn by.
    """
    waiting = getattr(p, "lift_grad", None)  # Of a pickled parameter, which has lost its hook.
    p.lift_indices, p.lift_grad, p.lift_number = indices, waiting, number  # type: ignore[attr-defined]
    _hooks[p] = p.register_post_accumulate_grad_hook(pack_gradient)
    trainable.note_change()


def remove_hook(p: Tensor) -> None:
    """Make the gradient of ``p`` an ordinary one again."""
    _hooks.pop(p).remove()
    p.lift_indices = p.lift_grad = None  # type: ignore[attr-defined]
    trainable.note_change()


def hooked_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of a model whose gradients are packed by a hook."""
    return [p for p in model.parameters() if p in _hooks]


@torch.no_grad()
def pack_gradient(p: Any) -> None:
    """Move the complete gradient of one parameter to ``p.lift_grad``.

    The dense gradient is freed before that of the next layer is made.
    """
    packed = ops.packed_gather(p.grad, p.lift_indices, dtype=torch.float32)
    p.grad = None
    p.lift_grad = packed if p.lift_grad is None else p.lift_grad.add_(packed)
