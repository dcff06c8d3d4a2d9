"""Linear layers whose backward computes only the k selected entries of the weight gradient.

The trainable parameter of a packed layer is ``values``, an fp32 vector of the selected entries.
``weight`` is a parameter without gradient that holds the values rounded to its dtype. The forward
pass reads the weight alone. ``values`` is in the autograd graph only to receive its gradient.
Whoever changes ``values`` writes the weight too: LiftAdamW in its step, `optimizer_hooks` for other
optimizers, `PackedLinear.scatter` for everyone else.

A layer is converted in place by a change of its ``__class__``. So its name, its hooks, its keys in
a state dict and every reference to it stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..validation import check_index_list, check_matrix, require
from . import optimizer_hooks, trainable
from .functional import lift_linear
from .weight_version import follow_weight, regather, weight_version


class PackedLinear(nn.Module):
    """What packed layers share. `pack` converts a plain layer, `unpack` converts it back.

    Attributes:
        weight: parameter without gradient; it holds the rounded values at ``indices``.
        values: (k,) fp32 parameter, kept fp32 through ``.to(dtype)`` and ``.half()``.
        indices: (k,) int32; not a buffer, because DDP broadcasts buffers.
        lift_name: the layer's name for messages.
        lift_number: what random masks are drawn by, given by `pack_gradients`.
        lift_backend: of the weight gradient; None for the fastest usable one.
        stepped_by: class of another optimizer that has stepped ``values``, or an empty string.
    """

    weight: nn.Parameter
    values: nn.Parameter
    indices: Tensor
    bias: nn.Parameter | None
    lift_name: str = ""
    lift_number: int | None = None
    lift_backend: str | None = None
    stepped_by: str = ""
    _transposed = False
    _plain: type[nn.Module]
    _required_grad: bool  # of the weight, before
    _seen: tuple[int, int]  # version of the weight when values last agreed with it

    @staticmethod
    def check(module: nn.Module, name: str = "") -> None:
        """Raise, naming the layer, unless `pack` can convert it."""
        label = name or type(module).__name__
        require(
            "forward" not in vars(module),
            f"{label}: its forward was replaced on the instance, which a packed layer would not call; pack the model "
            "before another library wraps it",
            RuntimeError,
        )
        weight = module.get_parameter("weight")
        check_matrix(weight, label)
        require(weight.dim() == 2, f"{label}: a layer's weight must be a matrix, got shape {tuple(weight.shape)}")

    @classmethod
    def pack(
        cls, module: nn.Module, indices: Tensor, name: str = "", values: nn.Parameter | None = None
    ) -> PackedLinear:
        """Convert ``module`` in place. Hooks, names and the weight itself stay.

        Args:
            indices: (k,) int32, sorted flat positions in the weight.
            name: of the layer, for messages.
            values: of another layer that shares the weight; None makes new ones.

        Raises, naming the layer, for a weight or an index list that cannot be used. Nothing is
        changed then.
        """
        cls.check(module, name)
        label, weight = name or type(module).__name__, module.get_parameter("weight")
        check_index_list(indices, weight.numel(), label, weight.device)
        if values is not None:
            require(
                values.shape == indices.shape and values.dtype == torch.float32,
                f"{label}: values must be {indices.numel()} float32 numbers, got {tuple(values.shape)} {values.dtype}",
            )
        return cls._convert(module, indices, name, values)

    @classmethod
    def _convert(
        cls, module: nn.Module, indices: Tensor, name: str = "", values: nn.Parameter | None = None
    ) -> PackedLinear:
        """`pack` without its checks, for layers that were checked and lists of our own."""
        weight = module.get_parameter("weight")
        if values is None:
            values = nn.Parameter(ops.packed_gather(weight.detach(), indices, dtype=torch.float32))
        plain, required = type(module), weight.requires_grad
        module.__class__ = cls  # type: ignore[assignment]
        assert isinstance(module, PackedLinear)
        module._plain, module._required_grad, module.lift_name, module.indices = plain, required, name, indices
        weight.requires_grad_(False)
        weight.grad = None
        module.register_parameter("values", values)
        module._mark()
        module._register()
        return module

    def unpack(self) -> nn.Module:
        """Convert back to the plain layer, in place, with the present weight."""
        required, values, plain = self._required_grad, self.values, self._plain
        trainable.forget(values, self)
        del self.values
        for name in (
            "_plain",
            "_required_grad",
            "_seen",
            "lift_name",
            "lift_number",
            "stepped_by",
            "lift_backend",
            "indices",
        ):
            self.__dict__.pop(name, None)
        self.__class__ = plain  # type: ignore[assignment]
        self.weight.requires_grad_(required)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return lift_linear(
            x, self.values, self.weight, self.indices, self.bias, transposed=self._transposed, backend=self.lift_backend
        )

    @torch.no_grad()
    def scatter(self) -> None:
        """Write ``values`` into the weight, rounded to nearest even."""
        ops.packed_scatter_(self.weight, self.indices, self.values)
        self._mark()

    @torch.no_grad()
    def regather(self) -> bool:
        """Let ``values`` follow the weight, and return whether any value changed.

        Entries that round to the weight's present value keep all their bits.
        """
        changed = trainable.has_numbers(self.values) and regather(self.values, self.weight, self.indices)
        self._mark()
        return changed

    @torch.no_grad()
    def follow_weight(self) -> bool:
        """`regather` if the weight was written since ``values`` last agreed with it.

        Returns whether any value changed.
        """
        if not trainable.has_numbers(self.values):  # The master of an optimizer follows the weight.
            return False
        self._seen, changed = follow_weight(self._seen, self.values, self.weight, self.indices)
        return changed

    def _register(self) -> None:
        """Make ``values`` known to optimizers."""
        trainable.register(self.values, self)
        optimizer_hooks.watch(self.values)

    def _mark(self) -> None:
        self._seen = weight_version(self.weight)

    @contextmanager
    def _without_values(self) -> Iterator[None]:
        """Inside this context ``values`` is not a parameter of the layer."""
        values = self._parameters.pop("values")
        try:
            yield
        finally:
            self._parameters["values"] = values

    def _apply(self, fn, recurse=True):
        values = self.values
        with self._without_values():
            super()._apply(fn, recurse)
        with torch.no_grad():
            moved = _moved(values.data, fn)
            if torch._has_compatible_shallow_copy_type(values, moved):
                values.data = moved
                if values.grad is not None:
                    values.grad.data = _moved(values.grad, fn)
            else:  # From and to the meta device nn.Module makes new parameters, too.
                self._parameters["values"] = nn.Parameter(moved, values.requires_grad)
                self._register()
            self.indices = _moved(self.indices, fn)
        trainable.note_change()  # The weight may be another parameter now.
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}values", None)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        with self._without_values():
            super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.weight.requires_grad_(False)  # assign=True brings a new parameter
        self.regather()

    def __getstate__(self) -> dict[str, Any]:
        # A view of an optimizer's arena would be copied and pickled with the whole arena.
        return {**self.__dict__, "indices": self.indices.clone()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "values" and type(value).__name__ == "DTensor":
            raise RuntimeError(
                f"{self.lift_name or type(self).__name__}: fully_shard cuts values into equal chunks, which do not "
                "match the rows of the weight; sharded weights are not supported yet, replicas (DDP) are"
            )
        super().__setattr__(name, value)
        if name == "weight":  # as load_state_dict(assign=True) does
            trainable.note_change()


def _moved(tensor: Tensor, fn) -> Tensor:
    """The tensor where ``fn`` would put it, without a conversion of its dtype."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class LiftLinear(PackedLinear, nn.Linear):  # type: ignore[misc]
    """nn.Linear with a packed weight gradient."""


class LiftConv1D(PackedLinear):
    """transformers' Conv1D (y = x W + b) with a packed weight gradient."""

    _transposed = True
