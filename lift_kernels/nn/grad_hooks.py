"""Hooks that pack the gradient of a parameter, for weights that no packed layer can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from . import trainable

_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # hooked parameter -> handle of its hook
_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module in which DistributedDataParallel looks for names to leave out."""


def pack_on_accumulate(
    p: Tensor, indices: Tensor, number: int | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Pack the gradient of ``p`` from now on: its entries at ``indices`` go to ``p.lift_grad``.

    ``number`` is what random masks of ``p`` are drawn by. ``dtype`` is that of a gradient, float32
    or bfloat16. Sums of several are fp32.
    """
    waiting = getattr(p, "lift_grad", None)  # Of a pickled parameter, which has lost its hook.
    p.lift_dtype = dtype  # type: ignore[attr-defined]
    p.lift_indices, p.lift_grad, p.lift_number = indices, waiting, number  # type: ignore[attr-defined]
    _hooks[p] = p.register_post_accumulate_grad_hook(pack_gradient)
    trainable.note_change()


def remove_hook(p: Tensor) -> None:
    """Make the gradient of ``p`` an ordinary one again."""
    _hooks.pop(p).remove()
    p.lift_indices = p.lift_grad = None  # type: ignore[attr-defined]
    trainable.note_change()


def dtype_of(p: Any) -> torch.dtype:
    """The dtype of a packed gradient of a hooked parameter."""
    return p.lift_dtype


def hooked_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of a model whose gradients are packed by a hook."""
    return [p for p in model.parameters() if p in _hooks]


@torch.no_grad()
def pack_gradient(p: Any) -> None:
    """Move the complete gradient of one parameter to ``p.lift_grad``.

    The dense gradient is freed before that of the next layer is made.
    """
    first = p.lift_grad is None
    packed = ops.packed_gather(p.grad, p.lift_indices, dtype=p.lift_dtype if first else torch.float32)
    p.grad = None
    p.lift_grad = packed if first else p.lift_grad.float().add_(packed)


def leave_out_of_ddp(model: nn.Module) -> None:
    """Let DistributedDataParallel leave out the hooked parameters of ``model``.

    It would write a reduced dense gradient back. `LiftAdamW` averages the packed ones.
    """
    setattr(model, _IGNORED, IgnoredNames(model, getattr(model, _IGNORED, None)))


def put_back_into_ddp(model: nn.Module) -> None:
    """Undo `leave_out_of_ddp` in all modules. Names that others had put there come back."""
    for module in model.modules():
        names = module.__dict__.get(_IGNORED)
        if isinstance(names, IgnoredNames):
            delattr(module, _IGNORED)
            if names.others is not None:
                setattr(module, _IGNORED, names.others)


class IgnoredNames:
    """What DistributedDataParallel leaves out of a model, asked when it is constructed.

    These are the parameters that have a hook then. A deepcopy of a model alone has lost its hooks,
    and then nothing may be left out.

    Attributes:
        others: names that someone else had put in this place, or None.
    """

    def __init__(self, model: nn.Module, others: Iterable[str] | None) -> None:
        self._model, self.others = model, others

    def __iter__(self) -> Iterator[str]:
        yield from self.others or ()
        for name, p in self._model.named_parameters(remove_duplicate=False):
            if p in _hooks:
                yield name
                if "." not in name:
                    yield f".{name}"  # DistributedDataParallel also asks for "MODULE.NAME".

    def __contains__(self, name: str) -> bool:
        return name in list(self)
