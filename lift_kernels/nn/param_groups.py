"""Parameter groups for LiftAdamW: which weights of a model LIFT trains."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..validation import require
from .linear import PackedLinear


def lift_param_groups(
    model: nn.Module, include: str | None = None, exclude: str | None = None, *, freeze_rest: bool = False
) -> list[dict]:
    """A parameter group with the weights of a model's linear layers, which LIFT trains.

    Linear layers are nn.Linear and transformers' Conv1D, whose transposed weight changes no mask.
    Packed layers (`pack_gradients`) give their ``values`` in place of the weight. Embeddings, the
    output head and weights tied to them are left out. A weight that several layers share is taken
    once.

    Args:
        include, exclude: regular expressions that are searched in parameter names.
        freeze_rest: turn ``requires_grad`` off for every other parameter, as in the paper's recipe.

    Returns:
        ``[{"params": [(name, weight), ...], "lift": True}]``.

    Raises ValueError when a name matches both expressions or when no weight is left.
    """
    heads = _embeddings_and_head(model)
    chosen: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in model.named_modules():
        packed = isinstance(module, PackedLinear)
        if not (packed or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            continue
        weight = module.values if packed else module.weight
        name = f"{module_name}{'.' if module_name else ''}{'values' if packed else 'weight'}"
        if id(module.weight) in heads or id(weight) in chosen:
            continue
        included = include is not None and re.search(include, name) is not None
        excluded = exclude is not None and re.search(exclude, name) is not None
        require(
            not (included and excluded),
            f"{name} matches both include={include!r} and exclude={exclude!r}; make the rules disjoint",
        )
        if excluded or (include is not None and not included):
            continue
        chosen[id(weight)] = (name, weight)
    require(
        bool(chosen),
        f"no linear weight of {type(model).__name__} is left with include={include!r}, exclude={exclude!r}",
    )
    if freeze_rest:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    return [{"params": list(chosen.values()), "lift": True}]


def _embeddings_and_head(model: nn.Module) -> set[int]:
    """ids of the weights of embeddings and of the output head.

    Embeddings are found by their type, the head by transformers' accessor or by its usual names.
    """
    found = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and getattr(head, "weight", None) is not None:
        found.add(id(head.weight))
    for name, module in model.named_modules():
        if name.split(".")[-1] in ("lm_head", "embed_out") and getattr(module, "weight", None) is not None:
            found.add(id(module.weight))
    return found
