"""What an optimizer trains: the matrix, and where its gradient is. Three kinds of parameters.

- `DenseMatrix`: a matrix with an ordinary gradient ``p.grad`` (matrix mode).
- `HookedMatrix`: a matrix, or a 3-D batch of matrices, with a hook. The hook packs the gradient
  into ``p.lift_grad`` at the index list ``p.lift_indices``.
- `PackedValues`: the ``values`` of packed layers (`lift_kernels.nn.linear`). Their ``grad`` is
  packed by the backward pass, and the matrix is the layers' ``weight``.

A registry in this module knows which vectors are the ``values`` of layers. An attribute of the
vector would be lost by deepcopy, and would make pickle follow a circle. Layers register again
whenever they are copied.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import dispatch
from ..validation import require
from . import weight_sample

_layers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> WeakSet of the layers that share them
_first: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> what its first mask left for a warm start
_versions = itertools.count(1)
version = 0
"""Rises when a parameter may have become another kind or got an index list, or a layer a weight."""


def note_change() -> None:
    """Say that a parameter became another kind or got an index list, or a layer another weight."""
    global version
    version = next(_versions)


def register(values: Tensor, layer: Any) -> None:
    """Register that ``layer`` holds ``values``."""
    _layers.setdefault(values, weakref.WeakSet()).add(layer)
    note_change()


def forget(values: Tensor, layer: Any) -> None:
    """Remove ``layer`` from the layers that hold ``values``."""
    _layers.get(values, weakref.WeakSet()).discard(layer)
    note_change()


def has_numbers(values: Tensor) -> bool:
    """Whether the ``values`` of a layer have memory. If not, they only receive a gradient."""
    return values.numel() == 0 or values.untyped_storage().nbytes() > 0


def layers_of(parameter: Tensor) -> list[Any]:
    """The layers whose ``values`` this is; none for every other parameter."""
    return list(_layers.get(parameter, ()))


def packed_weights() -> dict[int, Tensor]:
    """The ``values`` of all packed layers, by the id of the layers' weight."""
    return {id(layer.weight): values for values, layers in _layers.items() for layer in layers}


def set_initial_mask(parameter: Tensor, warm: dict[str, Tensor]) -> None:
    """Keep ``basis`` and ``threshold`` of a mask that was made before there was an optimizer.

    A sample of the weight goes with them. It tells later whether the mask was made from the weight
    that is trained.
    """
    kind = trainable_of(parameter)
    assert kind.indices is not None
    _first[parameter] = {**warm, weight_sample.KEY: weight_sample.sample_of(kind.matrix, kind.indices)}


def trainable_of(parameter: Tensor) -> Trainable:
    """The parameter as the kind that it is now (`version` tells when to ask again)."""
    layers = layers_of(parameter) if parameter.dim() == 1 else []
    if layers:
        return PackedValues(parameter, layers)
    return HookedMatrix(parameter) if getattr(parameter, "lift_indices", None) is not None else DenseMatrix(parameter)


class Trainable:
    """A parameter, the matrix whose entries it trains, and its gradient.

    Attributes:
        parameter: what the optimizer's groups hold.
        matrix: the matrix, or 3-D batch of matrices.
        packed: whether ``parameter.grad`` holds the trained entries alone.
        hooked: whether a hook packs the gradient.
        layers: the packed layers that share the parameter.
    """

    packed = False
    hooked = False
    layers: tuple[Any, ...] = ()

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    @property
    def matrix(self) -> Tensor:
        return self.parameter

    @property
    def indices(self) -> Tensor | None:
        """The index list of its packed gradients, if it has one."""
        return None

    @property
    def name(self) -> str | None:
        """The name of the packed layer that the parameter belongs to, if it has one."""
        return None

    @property
    def draw_number(self) -> int | None:
        """What its first random mask was drawn by, if pack_gradients has made one."""
        return None

    @property
    def pending(self) -> bool:
        """Whether a packed gradient waits for a step."""
        return False

    def gradient(self, name: str) -> tuple[Tensor | None, bool]:
        """The gradient, or None, and whether it is packed.

        Raises, naming the parameter, for a packed gradient that no step can use.
        """
        return self.parameter.grad, self.packed

    def clear(self) -> None:
        """Drop a packed gradient. Its entries may differ from those of a new mask."""

    def initial_state(self) -> dict[str, Tensor]:
        """The state that an optimizer starts from; empty where there is no index list yet."""
        return {}

    def bind(self, views: dict[str, Tensor]) -> None:
        """Point whatever reads the index list at an optimizer's present slices."""

    def is_bound(self, views: dict[str, Tensor]) -> bool:
        """Whether `bind` would change nothing."""
        return True


class DenseMatrix(Trainable):
    """A matrix with an ordinary gradient."""


class HookedMatrix(Trainable):
    """A matrix, or a batch of matrices, whose gradient a hook packs into ``lift_grad``."""

    parameter: Any
    hooked = True

    @property
    def indices(self) -> Tensor:
        return self.parameter.lift_indices

    @property
    def draw_number(self) -> int | None:
        return self.parameter.lift_number

    @property
    def pending(self) -> bool:
        return self.parameter.lift_grad is not None

    def gradient(self, name: str) -> tuple[Tensor | None, bool]:
        p = self.parameter
        grad, indices = p.lift_grad, self.indices
        if grad is None:
            return p.grad, False
        require(
            not dispatch.capturing(),
            f"{name}: a CUDA graph cannot follow its packed gradient lift_grad, a new tensor at every step; capture a "
            "model of packed layers, or unpack(model) and zero_grad(set_to_none=False)",
            RuntimeError,
        )
        require(
            p.grad is None,
            f"{name} has a packed lift_grad and a dense grad; clear one of them. DistributedDataParallel puts a dense "
            "grad back where it wraps another module than pack_gradients was given: give pack_gradients the very "
            "module that it wraps",
            RuntimeError,
        )
        require(
            grad.shape == indices.shape and grad.dtype == torch.float32 and grad.device == indices.device,
            f"{name}: lift_grad must be {indices.numel()} float32 numbers on {indices.device}, got "
            f"{tuple(grad.shape)} {grad.dtype} on {grad.device}",
        )
        return grad, True

    def clear(self) -> None:
        self.parameter.lift_grad = None

    def initial_state(self) -> dict[str, Tensor]:
        return {"indices": self.indices, **_first.pop(self.parameter, {})}

    def bind(self, views: dict[str, Tensor]) -> None:
        self.parameter.lift_indices = views["indices"]
        note_change()

    def is_bound(self, views: dict[str, Tensor]) -> bool:
        return self.indices is views["indices"]


class PackedValues(Trainable):
    """The ``values`` of packed layers that share one weight."""

    packed = True

    def __init__(self, parameter: Tensor, layers: list[Any]) -> None:
        super().__init__(parameter)
        self.layers = tuple(layers)

    @property
    def matrix(self) -> Tensor:
        return self.layers[0].weight

    @property
    def indices(self) -> Tensor:
        return self.layers[0].indices

    @property
    def draw_number(self) -> int | None:
        return self.layers[0].lift_number

    @property
    def name(self) -> str | None:
        return min((layer.lift_name for layer in self.layers if layer.lift_name), default=None)

    @property
    def pending(self) -> bool:
        return self.parameter.grad is not None

    def clear(self) -> None:
        self.parameter.grad = None

    def initial_state(self) -> dict[str, Tensor]:
        """The list that the layers chose, and their present values."""
        start = {"indices": self.indices}
        if has_numbers(self.parameter):
            start["master"] = self.parameter.detach()
        return start | _first.pop(self.parameter, {})

    def bind(self, views: dict[str, Tensor]) -> None:
        """``values`` becomes a view of the master, so there is no second copy.

        Where the master is on another device, ``values`` has no memory. A gradient of another
        length is dropped.
        """
        indices, master, p = views["indices"], views["master"], self.parameter
        for layer in self.layers:
            layer.indices = indices
        if p.grad is not None and p.grad.shape != indices.shape:
            p.grad = None
        p.data = master if master.device == indices.device else _without_memory(indices)
        note_change()

    def is_bound(self, views: dict[str, Tensor]) -> bool:
        indices, master, p = views["indices"], views["master"], self.parameter
        if master.device == indices.device:
            same = p.data_ptr() == master.data_ptr()
        else:
            same = p.shape == indices.shape and not has_numbers(p)
        return same and all(layer.indices is indices for layer in self.layers)


def _without_memory(like: Tensor) -> Tensor:
    """fp32 values of this shape and device that only receive a gradient."""
    values = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    values.untyped_storage().resize_(0)
    return values
