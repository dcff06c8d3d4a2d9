"""Models on fake tensors, converted to what each kind of training makes of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..nn.functional import lift_linear
from ..nn.grad_hooks import pack_on_accumulate
from ..nn.weight_kinds import is_conv1d
from .model_shapes import ModelShapes, to_fake

Kind = Literal["full", "dense", "packed", "lora", "shira"]
"""What is trained: all weights, LIFT's matrices with dense or packed gradients, or adapters."""
LORA_RANK = 16


def convert(model: Any, kind: Kind, shapes: ModelShapes) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Move a model to fake tensors, and convert it for a kind of training.

    Args:
        model: on the meta device, of ``shapes`` with all layers or fewer, for lora as `add_lora`
            returns it; it is changed.
        kind: what is trained.
        shapes: what LIFT trains of the model.

    Returns:
        The model, its trained parameters, and what is kept beside parameters and buffers.
    """
    to_fake(model)
    if kind in ("full", "lora"):
        return model, [p for p in model.parameters() if p.requires_grad], []
    present = dict(model.named_parameters())
    counts = {m.name: m.count * m.k for m in shapes.matrices if m.name in present}
    for name, p in present.items():
        p.requires_grad_(kind == "dense" and name in counts)
    if kind == "dense":
        return model, [present[name] for name in counts], []
    if kind == "shira":
        return _add_shira(model, shapes)
    lists = {name: torch.empty(k, dtype=torch.int32) for name, k in counts.items()}
    trained = [_pack(model, name, present[name], indices) for name, indices in lists.items()]
    return model, trained, list(lists.values())


def _pack(model: nn.Module, name: str, weight: Any, indices: Tensor) -> Tensor:
    """Pack the gradient of one weight as `pack_gradients` does, whose masks need numbers."""
    holders = [(m, own) for m in model.modules() for own, p in m._parameters.items() if p is weight]
    if not all(own == "weight" and (type(m) is nn.Linear or is_conv1d(m)) for m, own in holders):
        pack_on_accumulate(weight.requires_grad_(True), indices)
        return weight
    values = nn.Parameter(torch.empty(len(indices)))
    for module, _ in holders:
        _replace(model, module, _Packed(module, values, indices))
    return values


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def add_lora(model: Any, shapes: ModelShapes) -> Any:
    """Put peft's LoRA at each linear layer, as `finetune --method lora` does.

    Args:
        model: on the meta device; it is changed.
        shapes: what it was made from.

    Raises:
        UserError: where peft is missing or cannot adapt the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("a plan of LoRA needs the package peft; run `pip install peft`") from error
    present = dict(model.named_modules())
    targets = [name for name in (w.rpartition(".")[0] for w in shapes.linear) if name in present]
    try:
        return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets))
    except (ValueError, TypeError) as error:  # such as for Mamba
        raise UserError(f"peft cannot adapt a {type(model).__name__}") from error


def _add_shira(model: Any, shapes: ModelShapes) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Put layers in place that keep what peft's SHiRA keeps, whose masks need numbers."""
    present = dict(model.named_modules())
    owners = {m.name.removesuffix(".weight"): m for m in shapes.matrices if m.name in shapes.linear}
    adapters = []
    for name, matrix in owners.items():
        if name in present:
            adapters.append(_Shira(present[name], matrix.k))
            _replace(model, present[name], adapters[-1])
    return model, [adapter.values for adapter in adapters], [adapter.indices for adapter in adapters]


class _Packed(nn.Module):
    """A linear layer with packed gradients, `lift_kernels.LiftLinear` without its bookkeeping."""

    def __init__(self, layer: Any, values: nn.Parameter, indices: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.values, self.indices = layer.weight, layer.bias, values, indices
        self._transposed = is_conv1d(layer)

    def forward(self, x: Tensor) -> Tensor:
        return lift_linear(x, self.values, self.weight, self.indices, self.bias, transposed=self._transposed)


class _Shira(nn.Module):
    """A linear layer with peft's SHiRA, which adds sparse values to a copy of the weight."""

    def __init__(self, layer: Any, k: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.values = nn.Parameter(torch.empty(k))
        self.indices = torch.empty(2, k, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        new = self.weight.clone()
        rows, columns = self.indices.long()
        new = new.index_put_((rows, columns), self.values.to(new.dtype), accumulate=True)
        return F.linear(x, new, self.bias)
