"""The three kinds of trainable parameters: where the gradient is, and which matrix they train.

- A matrix with an ordinary gradient ``p.grad`` (matrix mode).
- A matrix, or a 3-D batch of matrices, with a hook. The hook packs the gradient into
  ``p.lift_grad`` at the index list ``p.lift_indices``.
- The ``values`` of packed layers (`lift_kernels.nn.linear`). Their ``grad`` is packed by the
  backward pass, and the matrix is the layers' ``weight``.

A registry in this module knows which vectors are the ``values`` of layers. An attribute of the
vector would be lost by deepcopy, and would make pickle follow a circle. Layers register again
whenever they are copied.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import dispatch
from ..validation import require

_layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> WeakSet of the layers that share them
_first: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> what its first mask left for a warm start


def register(values: Tensor, layer: Any) -> None:
    """Register that ``layer`` holds ``values``."""
    _layers.setdefault(values, weakref.WeakSet()).add(layer)


def forget(values: Tensor, layer: Any) -> None:
    """Remove ``layer`` from the layers that hold ``values``."""
    _layers.get(values, weakref.WeakSet()).discard(layer)


def layers_of(parameter: Tensor) -> list[Any]:
    """The layers whose ``values`` this is; none for every other parameter."""
    return list(_layers.get(parameter, ()))


def is_hooked(parameter: Tensor) -> bool:
    """Whether a hook packs the gradient of this matrix or batch of matrices."""
    return getattr(parameter, "lift_indices", None) is not None


def is_values(parameter: Tensor) -> bool:
    """Whether this is the ``values`` of a packed layer."""
    return parameter.dim() == 1 and bool(_layers.get(parameter))


def matrix_of(parameter: Tensor) -> Tensor:
    """The matrix, or batch of matrices, whose entries the parameter trains.

    It is a layer's weight, or the parameter itself.
    """
    layers = layers_of(parameter) if parameter.dim() == 1 else []
    return layers[0].weight if layers else parameter


def name_of(parameter: Tensor) -> str | None:
    """The name of the packed layer that a parameter belongs to, or None."""
    return min((layer.lift_name for layer in layers_of(parameter) if layer.lift_name), default=None)


def hooked_gradient(parameter: Tensor) -> Tensor | None:
    """What the hook of a matrix has packed since the last step, or None."""
    return getattr(parameter, "lift_grad", None)


def gradient_of(parameter: Tensor, layer: Any = None) -> tuple[Tensor | None, bool]:
    """The gradient, or None, and whether it is packed.

    ``layer`` is the packed layer whose ``values`` the parameter is, or None.
    """
    hooked = hooked_gradient(parameter)
    return (parameter.grad, layer is not None) if hooked is None else (hooked, True)


def check_hooked_gradient(parameter: Tensor, name: str) -> None:
    """Raise, naming the parameter, unless a step can use what its hook has packed."""
    grad = hooked_gradient(parameter)
    if grad is None:
        return
    indices: Tensor = parameter.lift_indices  # type: ignore[attr-defined]
    require(
        not dispatch.capturing(),
        f"{name}: a CUDA graph cannot follow its packed gradient lift_grad, a new tensor at every step; capture a "
        "model of packed layers, or unpack(model) and zero_grad(set_to_none=False)",
        RuntimeError,
    )
    require(parameter.grad is None, f"{name} has a packed lift_grad and a dense grad; clear one of them", RuntimeError)
    require(
        grad.shape == indices.shape and grad.dtype == torch.float32 and grad.device == indices.device,
        f"{name}: lift_grad must be {indices.numel()} float32 numbers on {indices.device}, got {tuple(grad.shape)} "
        f"{grad.dtype} on {grad.device}",
    )


def set_initial_mask(parameter: Tensor, warm: dict[str, Tensor]) -> None:
    """Keep ``basis`` and ``threshold`` of a mask that was made before there was an optimizer."""
    _first[parameter] = warm


def initial_state(parameter: Tensor) -> dict[str, Tensor] | None:
    """The state that an optimizer starts from, or None for a parameter without an index list.

    It holds the index list that `pack_gradients` chose, and the present values of packed layers.
    """
    layers = layers_of(parameter)
    if layers:
        return {"indices": layers[0].indices, "master": parameter.detach(), **_first.pop(parameter, {})}
    if is_hooked(parameter):
        return {"indices": parameter.lift_indices, **_first.pop(parameter, {})}  # type: ignore[attr-defined]
    return None


def bind(parameter: Tensor, entry: dict[str, Tensor]) -> None:
    """Point the layers, or the hooked matrix, at an optimizer's current slices.

    ``values`` becomes a view of the slice ``entry["master"]``, so there is no second copy. A
    gradient of another length is dropped.
    """
    indices = entry["indices"]
    for layer in layers_of(parameter):
        layer.indices = indices
    if is_values(parameter):
        if parameter.grad is not None and parameter.grad.shape != indices.shape:
            parameter.grad = None
        parameter.data = entry["master"]
    elif is_hooked(parameter):
        parameter.lift_indices = indices  # type: ignore[attr-defined]


def clear_gradient(parameter: Tensor) -> None:
    """Drop a packed gradient. Its entries may differ from those of a new mask."""
    if is_values(parameter):
        parameter.grad = None
    elif hooked_gradient(parameter) is not None:
        parameter.lift_grad = None  # type: ignore[attr-defined]


def holds_packed_gradient(parameter: Tensor) -> bool:
    """Whether a packed gradient waits for a step."""
    return hooked_gradient(parameter) is not None or (is_values(parameter) and parameter.grad is not None)
