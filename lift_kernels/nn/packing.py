"""Convert a model to packed gradients, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.replicas import Replicas
from ..masks.budget import mask_rank, trained_entries
from ..masks.selection import SelectionRequest, check_seed, check_selection, make_masks, warm_part
from ..ops import dispatch
from ..validation import check_matrix, require
from . import trainable
from .grad_hooks import hooked_parameters, leave_out_of_ddp, pack_on_accumulate, put_back_into_ddp, remove_hook
from .linear import LiftConv1D, LiftLinear, PackedLinear
from .param_groups import lift_param_groups
from .weight_kinds import is_conv1d
from .weight_version import warn_of_changed


def pack_gradients(
    model: nn.Module,
    include: str | None = None,
    exclude: str | None = None,
    *,
    extra: str | None = None,
    rank: int | None = None,
    density: float = 0.05,
    budget_rank: int | None = None,
    selection: str | Callable[[Tensor, int], Tensor] = "principal",
    seed: int = 0,
    freeze_rest: bool = False,
    grad_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    process_group: torch.distributed.ProcessGroup | str | None = None,
) -> list[dict[str, Any]]:
    """Convert ``model`` in place so that no dense gradient of a trained matrix is kept.

    The linear layers of `lift_param_groups` become `LiftLinear` or `LiftConv1D`. Layers that share
    a weight share ``values``. A weight that some other module holds too gets a hook, which packs
    its gradient into ``p.lift_grad``. DistributedDataParallel leaves such a weight out, and
    `LiftAdamW` averages its gradient over the ranks of its ``process_group``. The first masks are
    made here, with the same options and results as in `LiftAdamW`.

    ``state_dict()`` keeps the plain model's keys, and `unpack` gives the plain model back. Convert
    before other libraries wrap the model and before the first step. The model may move to its
    device before or after that.

    Args:
        include, exclude, freeze_rest: of `lift_param_groups`.
        extra: of `lift_param_groups`. These weights get a hook.
        rank, density, budget_rank, selection, seed: of `LiftAdamW`.
        grad_dtype: of packed gradients, float32 or bfloat16. Those of several backward passes are
            added in float32, which the sum then has, but not among several ranks.
        backend: of the layers' weight gradients; None for the fastest usable one.
        process_group: of `LiftAdamW`. Its ranks must have the same weights here, before
            DistributedDataParallel broadcasts those of rank 0.

    Returns:
        Parameter groups for `LiftAdamW`.

    Raises ValueError, TypeError or RuntimeError, naming the parameter, for a model that cannot be
    converted. The model is unchanged then.
    """
    require(
        not any(isinstance(module, PackedLinear) for module in model.modules()) and not hooked_parameters(model),
        "the model has packed gradients already; unpack(model) first",
        RuntimeError,
    )
    usable = dispatch.OPS["packed_weight_grad"]
    require(
        backend is None or backend in usable,
        f"backend {backend!r} computes no packed weight gradients; choose one of {', '.join(usable)}, or None",
    )
    require(
        grad_dtype in (torch.float32, torch.bfloat16),
        f"grad_dtype must be torch.float32 or torch.bfloat16, got {grad_dtype!r}",
        TypeError,
    )
    check_selection(selection)
    check_seed(seed)
    replicas = Replicas(process_group)
    required = {p: p.requires_grad for p in model.parameters()}
    try:
        group, *dense = lift_param_groups(model, include, exclude, extra=extra, freeze_rest=freeze_rest)
        chosen = dict(group["params"])
        options = {"rank": rank, "density": density, "budget_rank": budget_rank}
        requests = [_selection_request(i, *item, rank, density, budget_rank) for i, item in enumerate(chosen.items())]
        masks = dict(zip(chosen, make_masks(requests, selection=selection, seed=seed, replicas=replicas)))
        holders = _holders(model)
        layers = {name: _plain_layers(holders[id(p)], p) for name, p in chosen.items()}
        _check_layers(layers)
    except Exception:
        for p, grad in required.items():
            p.requires_grad_(grad)
        raise
    trained = []
    for number, (name, p) in enumerate(chosen.items()):
        if layers[name]:
            for _, module in layers[name]:
                module.lift_backend, module.lift_number = backend, number  # type: ignore[assignment]
            trained.append(
                (
                    f"{name.removesuffix('weight')}values",
                    _pack_layers(layers[name], masks[name].indices, required[p], grad_dtype),
                )
            )
        else:
            pack_on_accumulate(p.requires_grad_(True), masks[name].indices, number, grad_dtype)
            trained.append((name, p))
        trainable.set_initial_mask(trained[-1][1], warm_part(masks[name]._asdict(), p, "device"))
    if hooked_parameters(model):
        leave_out_of_ddp(model)
    return [{"params": trained, "lift": True, **options}, *dense]


def unpack(model: nn.Module) -> nn.Module:
    """Convert a packed model back to the plain one, in place.

    Layers get their own classes and weights their ``requires_grad`` back, hooks go, and gradients
    are dropped. An optimizer that was made for the packed model has nothing left to train.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    changed = [layer.lift_name or "a layer" for layer in layers if layer.follow_weight()]
    warn_of_changed(changed, "the plain layers keep the new weights")
    for layer in layers:
        layer.unpack()
    for p in hooked_parameters(model):
        remove_hook(p)
    put_back_into_ddp(model)
    return model


def _selection_request(
    number: int, name: str, p: Tensor, rank: int | None, density: float, budget_rank: int | None
) -> SelectionRequest:
    """What `make_masks` needs of a parameter. Raises, naming it, unless LIFT can train it."""
    check_matrix(p, name)
    used = mask_rank(p.shape, rank, name)
    k = trained_entries(p.shape, density, budget_rank, name)
    return SelectionRequest(p.detach(), p.grad, used, k, name, number, {})


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """By id of each parameter, where it is: (name of the module, module, name within it)."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append((module_name, module, name))
    return holders


def _plain_layers(holders: list[tuple[str, nn.Module, str]], p: Tensor) -> list[tuple[str, nn.Module]]:
    """The layers that hold a weight, with their names; none when another module holds it, too.

    A subclass of nn.Linear counts as another module. It may use its weight in ways that a packed
    layer does not know, as nn.MultiheadAttention does.
    """
    plain = all(_class_of(module) is not None and name == "weight" for _, module, name in holders)
    return [(name, module) for name, module, _ in holders] if plain else []


def _class_of(module: nn.Module) -> type[PackedLinear] | None:
    if type(module) is nn.Linear:
        return LiftLinear
    return LiftConv1D if is_conv1d(module) else None


def _check_layers(layers: dict[str, list[tuple[str, nn.Module]]]) -> None:
    for members in layers.values():
        for name, module in members:
            PackedLinear.check(module, name)


def _pack_layers(
    members: list[tuple[str, nn.Module]], indices: Tensor, required: bool, grad_dtype: torch.dtype
) -> nn.Parameter:
    """Convert the layers that share one weight, and return the values that they share.

    ``required`` is the weight's ``requires_grad`` before anything was frozen.
    """
    values: nn.Parameter | None = None
    weight = members[0][1].get_parameter("weight")
    for name, module in members:
        cls = _class_of(module)
        assert cls is not None
        weight.requires_grad_(required)  # what each layer remembers for `unpack`
        values = cls._convert(module, indices, name, values, grad_dtype).values
    assert values is not None
    return values
