"""Hooks that pack the gradient of a parameter, for weights that no packed layer can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from . import trainable

_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # hooked parameter -> handle of its hook


def pack_on_accumulate(p: Tensor, indices: Tensor) -> None:
    """From now on the gradient of ``p`` goes to ``p.lift_grad``: the entries at
    ``p.lift_indices``.
    """
    p.lift_indices, p.lift_grad = indices, None  # type: ignore[attr-defined]
    _hooks[p] = p.register_post_accumulate_grad_hook(pack_gradient)


def remove_hook(p: Tensor) -> None:
    """The gradient of ``p`` is an ordinary one again."""
    _hooks.pop(p).remove()
    p.lift_indices = p.lift_grad = None  # type: ignore[attr-defined]


def hooked_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of a model whose gradients are packed by a hook."""
    return [p for p in model.parameters() if p in _hooks]


@torch.no_grad()
def pack_gradient(p: Any) -> None:
    """Move the gradient of one parameter, when it is complete, to ``p.lift_grad``.

    So the dense gradient is freed before the next layer's is made.
    """
    packed = ops.packed_gather(p.grad, p.lift_indices, dtype=torch.float32)
    p.grad = None
    p.lift_grad = packed if trainable.hooked_gradient(p) is None else p.lift_grad.add_(packed)
