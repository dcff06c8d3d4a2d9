"""Parameter groups for LiftAdamW: which weights of a model LIFT trains."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from ..validation import require
from .quantized import quantized_layer
from .weight_kinds import (
    ADAPTER,
    COMPUTED,
    CONVOLUTION,
    LINEAR,
    MATRICES,
    MATRIX,
    STACK,
    TASK_HEAD,
    Weight,
    output_heads,
    weights_of,
)

logger = logging.getLogger("lift_kernels")

SMALL_SHARE = 0.01
"""Of a model's matrices. Kinds of weights that hold less are left out without a word."""
_LEFT_OUT = {
    STACK: "stacks of matrices, such as experts",
    MATRIX: "matrices outside linear layers",
    COMPUTED: "weights that layers compute others from (weight_norm, spectral_norm, pruning)",
    CONVOLUTION: "weights of convolutions",
}
_REMEDIES = {
    COMPUTED: "torch.nn.utils.parametrize.remove_parametrizations makes the layers plain (for the older functions: "
    "remove_weight_norm, remove_spectral_norm, prune.remove)",
    CONVOLUTION: "LIFT trains matrices alone; add them in a group with lift=False",
}


def lift_param_groups(
    model: nn.Module,
    include: str | None = None,
    exclude: str | None = None,
    *,
    extra: str | None = None,
    freeze_rest: bool = False,
) -> list[dict]:
    """Parameter groups with the weights of a model that LIFT trains.

    These are the weights of linear layers: nn.Linear and transformers' Conv1D, whose transposed
    weight changes no mask. Packed layers (`pack_gradients`) give their ``values`` in place of the
    weight. A weight that several layers share is taken once. Left out are

    - embeddings, the output head and weights tied to them;
    - adapters of peft. The layers that they wrap are taken;
    - all weights outside linear layers, unless ``extra`` names them.

    The head of a transformers model for another task, such as a classifier, is no pretrained
    matrix. A second group trains it densely, unless ``include`` names it.

    A warning names each kind of weights that is left out although it holds at least 1 % of the
    model's matrices, and the option that changes it.

    Args:
        include, exclude: regular expressions that are searched in parameter names.
        extra: regular expression; further weights whose names match are taken, such as stacked
            expert weights. They are matrices or 3-D stacks of matrices, no biases.
        freeze_rest: turn ``requires_grad`` off for every other parameter, as in the paper's recipe.

    Returns:
        ``[{"params": [(name, weight), ...], "lift": True}]``, and perhaps a group of a task head
        with ``"lift": False``.

    Raises ValueError for a pattern that is no regular expression, when a name matches both
    ``include`` and ``exclude``, when no weight is left, when ``extra`` matches nothing, and for
    quantized layers, which it names.
    """
    for option, pattern in (("include", include), ("exclude", exclude), ("extra", extra)):
        _check_pattern(option, pattern)
    rules = _Rules(include, exclude)
    weights = weights_of(model)
    _refuse_quantized(model, rules)
    chosen = [w for w in weights if _is_linear(w, include) and rules.take(w.name)]
    chosen += _further(model, weights, chosen, rules, extra)
    require(bool(chosen), _nothing_left(model, weights, rules))
    taken = {id(w.parameter) for w in chosen}
    heads = [w for w in weights if w.kind == TASK_HEAD and id(w.parameter) not in taken and not rules.excludes(w.name)]
    if freeze_rest:
        trained = taken | {id(w.parameter) for w in heads}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    _say_what_is_left_out(weights, chosen, heads, rules)
    groups: list[dict] = [{"params": [(w.name, w.parameter) for w in chosen], "lift": True}]
    if heads:
        groups.append({"params": [(w.name, w.parameter) for w in heads], "lift": False})
    return groups


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D stacks of matrices of a model, such as expert weights, by name."""
    return {w.name: w.parameter for w in weights_of(model) if w.kind == STACK}


def _check_pattern(option: str, pattern: str | None) -> None:
    """Raise ValueError or TypeError, naming option and value, unless it is a regular expression."""
    require(
        pattern is None or isinstance(pattern, str),
        f"{option} must be a regular expression as a string or None, got {pattern!r}",
        TypeError,
    )
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{option}={pattern!r} is no regular expression: {error}") from error


def pattern_of(names: Iterable[str]) -> str:
    """A regular expression that matches these parameter names alone; "" for none."""
    return "|".join(f"^{re.escape(name)}$" for name in names)


class _Rules(NamedTuple):
    """Regular expressions that are searched in parameter names."""

    include: str | None
    exclude: str | None

    def includes(self, name: str) -> bool:
        return self.include is None or re.search(self.include, name) is not None

    def excludes(self, name: str) -> bool:
        return self.exclude is not None and re.search(self.exclude, name) is not None

    def take(self, name: str) -> bool:
        """Whether the rules leave a name. Raises ValueError where they contradict each other."""
        require(
            self.include is None or not (self.includes(name) and self.excludes(name)),
            f"{name} matches both include={self.include!r} and exclude={self.exclude!r}; make the rules disjoint",
        )
        return self.includes(name) and not self.excludes(name)

    def __str__(self) -> str:
        return f"include={self.include!r}, exclude={self.exclude!r}"


def _is_linear(weight: Weight, include: str | None) -> bool:
    """Whether a weight is of a linear layer, or of a task head that ``include`` may name."""
    return weight.kind == LINEAR or (weight.kind == TASK_HEAD and weight.parameter.dim() == 2 and include is not None)


def _further(
    model: nn.Module, weights: Sequence[Weight], chosen: Sequence[Weight], rules: _Rules, extra: str | None
) -> list[Weight]:
    """The weights whose names match ``extra``, without those that are chosen already."""
    if not extra:
        return []
    taken = {id(w.parameter) for w in chosen}
    matching = [w for w in weights if re.search(extra, w.name) and not rules.excludes(w.name)]
    found = [
        w for w in matching if w.parameter.dim() > 1 and not w.name.endswith("bias") and id(w.parameter) not in taken
    ]
    further = [w.name for w in weights if w.kind in (STACK, MATRIX)]
    hidden = [name for name in further if re.search(extra, name) and rules.excludes(name)]
    remedy = (
        "leave out extra=" if not further else f"its stacks and matrices outside linear layers are {_some(further)}"
    )
    require(
        bool(found),
        f"extra={extra!r} matches no further matrix of {type(model).__name__}; "
        + (f"exclude={rules.exclude!r} takes {_some(hidden)} away" if hidden else remedy),
    )
    return found


def _refuse_quantized(model: nn.Module, rules: _Rules) -> None:
    """Raise ValueError for quantized layers that the rules take. Output heads do not count."""
    heads = set(map(id, output_heads(model)))
    found = {
        name: label
        for name, module in model.named_modules()
        if id(module) not in heads
        and rules.includes(f"{name}.weight")
        and not rules.excludes(f"{name}.weight")
        and (label := quantized_layer(module)) is not None
    }
    name, label = next(iter(found.items()), ("", ""))
    require(
        not found,
        f"{name or type(model).__name__} is quantized ({label}; quantized layers: {len(found)}), and LIFT trains "
        "float32, bfloat16 or float16; load the model without quantization_config, or leave them out by exclude=",
    )


def _nothing_left(model: nn.Module, weights: Sequence[Weight], rules: _Rules) -> str:
    """The message for a model of which nothing would be trained."""
    further = [w.name for w in weights if w.kind in (STACK, MATRIX)]
    asked = [name for name in further if rules.includes(name) and not rules.excludes(name)]
    linear = [w.name for w in weights if w.kind == LINEAR]
    computed = any(w.kind == COMPUTED for w in weights)
    if linear and not asked:
        remedy = f"change these rules; the linear weights are {_some(linear)}"
    elif further:
        remedy = f"extra={_pattern(asked or further)!r} takes {_some(asked or further)}"
    else:
        remedy = _REMEDIES[COMPUTED] if computed else "LIFT has nothing to train there; use torch.optim.AdamW"
    return f"no linear weight of {type(model).__name__} is left with {rules}; {remedy}"


def _say_what_is_left_out(
    weights: Sequence[Weight], chosen: Sequence[Weight], heads: Sequence[Weight], rules: _Rules
) -> None:
    """Log a line for each kind of weights that is not trained as a user may expect."""
    taken = {id(w.parameter) for w in chosen}
    every = sum(w.numel for w in weights if w.kind in MATRICES)
    for kind, words in _LEFT_OUT.items():
        left = [
            w
            for w in weights
            if w.kind == kind and id(w.parameter) not in taken and rules.includes(w.name) and not rules.excludes(w.name)
        ]
        share = sum(w.numel for w in left) / max(1, every)
        if share >= SMALL_SHARE:
            names = [w.name for w in left]
            remedy = _REMEDIES.get(kind, f"extra={_pattern(names)!r} trains them")
            logger.warning(
                "%d %s, %.0f %% of the model's matrices, are left out, for example %s; %s",
                *(len(left), words, 100 * share, names[0], remedy),
            )
    adapters = [w.name for w in weights if w.kind == ADAPTER]
    if adapters:
        logger.warning(
            "%d weights of adapters are left out, for example %s; merge_and_unload() them first, or give them an "
            "optimizer of their own",
            *(len(adapters), adapters[0]),
        )
    if heads:
        logger.warning(
            "%s: outside the pretrained model, so taken for a new task head and trained densely; exclude= leaves it "
            "out, include= trains its principal weights",
            _some([w.name for w in heads]),
        )


def _pattern(names: Sequence[str]) -> str:
    """A regular expression that finds these names and reads well."""
    ends = [name.split(".")[-2:] for name in names]
    if len({tuple(end) for end in ends}) == 1:
        return ".".join(ends[0])
    if len({end[0] for end in ends}) == 1 and not ends[0][0].isdigit():
        return f"{ends[0][0]}."
    return "|".join(sorted({end[-1] for end in ends}))


def _some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
