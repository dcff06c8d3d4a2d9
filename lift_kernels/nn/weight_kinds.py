"""What each weight of a model is: of a linear layer, an embedding, a head, a stack, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..validation import require
from .linear import PackedLinear

LINEAR = "linear layer"
EMBEDDING = "embedding or output head"
TASK_HEAD = "task head"
ADAPTER = "adapter"
COMPUTED = "part of a computed weight"
STACK = "stack of matrices"
MATRIX = "matrix outside linear layers"
CONVOLUTION = "convolution"
OTHER = "vector or bias"

MATRICES = (LINEAR, STACK, MATRIX, CONVOLUTION, COMPUTED)
"""Kinds that make up a model's weights, beside embeddings and heads."""


class Weight(NamedTuple):
    """A parameter of a model.

    Attributes:
        name: its first name.
        parameter: the parameter. Of a packed layer it is ``values``; its ``weight`` is left out.
        kind: one of the kinds of this module.
        numel: entries of the parameter, or of the matrix that ``values`` belong to.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    numel: int


def weights_of(model: nn.Module) -> list[Weight]:
    """Every parameter of a model once, in the order of its modules, and what it is.

    A parameter with several holders is an embedding if one of them is. Else it belongs to a linear
    layer if one of them is, with that layer's name, or has the kind of its first holder.

    Raises ValueError for a layer that is not initialized yet.
    """
    embeddings, task_heads, adapters = _embeddings_and_heads(model), _task_heads(model), _adapters(model)
    found: dict[int, Weight] = {}
    for module_name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            name = f"{module_name}.{own}" if module_name else own
            packed = isinstance(module, PackedLinear)
            if parameter is None or (packed and own == "weight"):
                continue
            require(
                not is_lazy(parameter),
                f"{name} is not initialized; run the model once on an input, which gives lazy layers their shape",
            )
            matrix: Tensor = module.weight if packed and own == "values" else parameter  # type: ignore[assignment]
            if id(module) in adapters or own.startswith(("lora_A", "lora_B")):
                kind = ADAPTER
            elif id(matrix) in embeddings:
                kind = EMBEDDING
            elif id(module) in task_heads:
                kind = TASK_HEAD
            else:
                kind = _kind(module, own, matrix)
            if id(parameter) not in found or (kind == LINEAR and found[id(parameter)].kind == MATRIX):
                found[id(parameter)] = Weight(name, parameter, kind, matrix.numel())
    return list(found.values())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear, a subclass, transformers' Conv1D or a packed layer."""
    return isinstance(module, (nn.Linear, PackedLinear)) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer, and no convolution of that name."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.modules.conv._ConvNd)


def _kind(module: nn.Module, own: str, p: Tensor) -> str:
    """The kind of a parameter that is in no embedding, head or adapter."""
    if own == ("values" if isinstance(module, PackedLinear) else "weight") and is_linear(module):
        return LINEAR
    if isinstance(module, nn.modules.conv._ConvNd):
        return CONVOLUTION if p.dim() > 1 else OTHER
    if p.dim() not in (2, 3) or 1 in p.shape or own.endswith("bias"):  # A side of 1 makes a vector of a matrix.
        return OTHER
    if isinstance(module, nn.utils.parametrize.ParametrizationList) or own in ("weight_v", "weight_orig"):
        return COMPUTED
    return STACK if p.dim() == 3 else MATRIX


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    """ids of the weights of embeddings, which are found by their type, and of output heads."""
    tables = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {id(module._parameters.get("weight")) for module in (*tables, *output_heads(model))} - {id(None)}


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The modules that give a model's logits, by transformers' accessor or by their usual names.

    A task head is none, whatever its name: that of a model for CTC is a new ``lm_head``.
    """
    heads, new = [head for module in model.modules() if (head := _output_head(module)) is not None], _task_heads(model)
    named = [module for name, module in model.named_modules() if name.split(".")[-1] in ("lm_head", "embed_out")]
    return heads + [module for module in named if id(module) not in new]


def _task_heads(model: nn.Module) -> set[int]:
    """ids of the modules outside the pretrained part of transformers' models for other tasks.

    Such a model has a ``base_model`` and no output head, as a classifier does. Pretraining has not
    shaped these modules: they are random at first. Some classifiers, of Whisper and CLIP, hold the
    pretrained models of their parts instead.
    """
    found: set[int] = set()
    for module in filter(_is_pretrained_model, model.modules()):
        base: Any = getattr(module, "base_model", module)
        parts = [base] if base is not module and isinstance(base, nn.Module) else []
        if not parts and type(module).__name__.endswith("Classification"):
            parts = [part for part in module.children() if _is_pretrained_model(part)]
        if parts and _output_head(module) is None:
            found |= set(map(id, module.modules())) - {id(m) for part in parts for m in part.modules()}
    return found


def _is_pretrained_model(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def _output_head(module: nn.Module) -> nn.Module | None:
    """The output head of a transformers model, or None."""
    head = module.get_output_embeddings() if _is_pretrained_model(module) else None  # type: ignore[operator]
    return head if isinstance(head, nn.Module) else None


def _adapters(model: nn.Module) -> set[int]:
    """ids of the modules that peft has put into a model, beside the layers that they wrap.

    peft's layers hold the wrapped layer as ``base_layer``. Its copies of whole modules
    (``modules_to_save``) and the ones they replace count too, and so do tables and encoders of
    virtual tokens.
    """
    return {id(part) for module in model.modules() for part in _adapter_parts(module)}


def _adapter_parts(module: nn.Module) -> Iterator[nn.Module]:
    if hasattr(type(module), "adapter_layer_names") and isinstance(getattr(module, "base_layer", None), nn.Module):
        inside = set(map(id, module.base_layer.modules()))  # type: ignore[union-attr,operator]
        yield from (part for part in module.modules() if id(part) not in inside)
    elif any(cls.__name__ == "AuxiliaryTrainingWrapper" for cls in type(module).__mro__):
        yield from module.modules()
    elif any(cls.__name__ == "PeftModel" for cls in type(module).__mro__):
        prompts = getattr(module, "prompt_encoder", None)
        yield from prompts.modules() if isinstance(prompts, nn.Module) else ()
