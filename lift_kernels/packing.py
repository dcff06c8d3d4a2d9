"""Convert a model so that the gradients of the matrices that LIFT trains are packed, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import foreign, ops, owners
from .checks import require
from .linear import LiftConv1D, LiftLinear, PackedLinear
from .optimizer import LiftAdamW
from .param_groups import lift_param_groups
from .refresh import warm_part

_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # hooked parameter -> handle of its hook


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
    backend: str | None = None,
) -> list[dict[str, Any]]:
    """Convert ``model`` in place, so that no dense gradient of a trained matrix is kept; returns
    groups for `LiftAdamW`.

    Linear layers (those of `lift_param_groups`) become `LiftLinear` or `LiftConv1D`; layers that
    share a weight share ``values``. A weight that something else than plain linear layers holds,
    and every parameter whose name matches ``extra`` (matrices or 3-D batches of matrices, such as
    stacked expert weights), keeps its place and gets a hook that packs its gradient into
    ``p.lift_grad``. The first masks are made here, with the same options and results as
    `LiftAdamW`. ``backend`` is that of the layers' weight gradients.

    ``state_dict()`` keeps the plain model's keys; `unpack` gives the plain model back. Convert
    before other libraries wrap the model, and move it to its device first or afterwards as you
    like, but before the first step.

    Raises ValueError, TypeError or RuntimeError, naming the parameter, for a model that cannot be
    converted; it is unchanged then.
    """
    require(
        not any(isinstance(module, PackedLinear) for module in model.modules()) and not _hooked(model),
        "the model has packed gradients already; unpack(model) first",
        RuntimeError,
    )
    required = {p: p.requires_grad for p in model.parameters()}
    try:
        chosen = dict(lift_param_groups(model, include, exclude, freeze_rest=freeze_rest)[0]["params"])
        chosen |= _extra_parameters(model, extra, chosen)
        options = {"rank": rank, "density": density, "budget_rank": budget_rank}
        masks = LiftAdamW(
            [{"params": list(chosen.items()), "lift": True, **options}],
            selection=selection,
            seed=seed,
            process_group="independent",  # the optimizer that trains them compares them
        )
        masks.refresh()
        lists = {name: masks.state[p]["indices"].clone() for name, p in chosen.items()}
        warm = {name: warm_part(masks.state[p], p, "device") for name, p in chosen.items()}
        holders = _holders(model)
        layers = {name: _plain_layers(holders[id(p)], p) for name, p in chosen.items()}
        _check_layers(layers)
    except Exception:
        for p, grad in required.items():
            p.requires_grad_(grad)
        raise
    foreign.install()
    trained = []
    for name, p in chosen.items():
        if layers[name]:
            for _, module in layers[name]:
                module.lift_backend = backend  # type: ignore[assignment]
            trained.append((f"{name.removesuffix('weight')}values", _pack_layers(layers[name], lists[name])))
        else:
            _hook(p.requires_grad_(True), lists[name])
            trained.append((name, p))
        owners.note_first_mask(trained[-1][1], warm[name])
    return [{"params": trained, "lift": True, **options}]


def unpack(model: nn.Module) -> nn.Module:
    """Give the plain model back, in place: the layers' own classes, trainable weights as before, no
    hooks. Gradients are dropped.

    An optimizer that was made for the packed model has nothing to train any more.
    """
    for module in list(model.modules()):
        if isinstance(module, PackedLinear):
            module.unpack()
    for p in _hooked(model):
        _hooks.pop(p).remove()
        p.lift_indices = p.lift_grad = None  # type: ignore[attr-defined]
    return model


def _hooked(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p in _hooks]


def _extra_parameters(model: nn.Module, extra: str | None, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters whose names match ``extra`` and that are not among the chosen ones."""
    taken = {id(p) for p in chosen.values()}
    found: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if extra and re.search(extra, name) and id(p) not in taken
    }
    require(bool(found) or not extra, f"extra={extra!r} matches no further parameter of {type(model).__name__}")
    return found


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Where each parameter is: (name of the module, module, name within it)."""
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for module_name, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), []).append((module_name, module, name))
    return holders


def _plain_layers(holders: list[tuple[str, nn.Module, str]], p: Tensor) -> list[tuple[str, nn.Module]]:
    """The layers that hold the weight, with their names; none when something else than plain linear
    layers holds it too.

    A subclass of nn.Linear may use its weight in ways that a packed layer does not know
    (nn.MultiheadAttention does).
    """
    plain = all(_class_of(module) is not None and name == "weight" for _, module, name in holders)
    return [(name, module) for name, module, _ in holders] if plain else []


def _class_of(module: nn.Module) -> type[PackedLinear] | None:
    if type(module) is nn.Linear:
        return LiftLinear
    return LiftConv1D if type(module).__name__ == "Conv1D" else None


def _check_layers(layers: dict[str, list[tuple[str, nn.Module]]]) -> None:
    for members in layers.values():
        for name, module in members:
            PackedLinear.check(module, name)


def _pack_layers(members: list[tuple[str, nn.Module]], indices: Tensor) -> nn.Parameter:
    """Convert the layers that share one weight; returns the values that they share."""
    values: nn.Parameter | None = None
    weight = members[0][1].get_parameter("weight")
    required = weight.requires_grad
    for name, module in members:
        cls = _class_of(module)
        assert cls is not None
        weight.requires_grad_(required)  # what each layer remembers for `unpack`
        values = cls.pack(module, indices, name, values).values
    assert values is not None
    return values


def _hook(p: Tensor, indices: Tensor) -> None:
    p.lift_indices, p.lift_grad = indices, None  # type: ignore[attr-defined]
    _hooks[p] = p.register_post_accumulate_grad_hook(_pack_gradient)


@torch.no_grad()
def _pack_gradient(p: Any) -> None:
    """Runs when the gradient of one parameter is complete: the dense one is freed before the next
    layer's is made.
    """
    packed = ops.packed_gather(p.grad, p.lift_indices, dtype=torch.float32)
    p.grad = None
    p.lift_grad = packed if owners.hooked_gradient(p) is None else p.lift_grad.add_(packed)
