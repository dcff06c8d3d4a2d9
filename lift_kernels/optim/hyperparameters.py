"""Hyperparameters of a LiftAdamW group: their defaults and their checks."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..masks.budget import mask_rank, trained_entries
from ..masks.lowrank import METHODS
from ..masks.selection import check_entries_left, check_seed, check_selection
from ..nn.trainable import Trainable, trainable_of
from ..ops import dispatch
from ..ops.bias_correction import last_age
from ..validation import MOMENT_DTYPES, check_matrix, require
from .state_conversion import EIGHT_BIT

logger = logging.getLogger("lift_kernels")
OPTIONS = frozenset(
    {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "rank",
        "density",
        "budget_rank",
        "refresh_interval",
        "refresh_schedule",
        "bias_correction",
        "master",
        "rounding",
        "state_dtype",
        "capturable",
        "offload",
        "maximize",
        "lift",
        "steps_since_refresh",
    }
)
"""What every group holds beside its parameters."""

_STACK_SIDE = 16
"""The least side of stacked matrices. The kernels of convolutions are smaller."""
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|word_embeddings|shared)(\.|$)")


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError, naming option and value, for one out of range."""
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, f"a tensor lr must hold one number, got shape {tuple(lr.shape)}")
    number = lr.item() if isinstance(lr, Tensor) else lr
    require(_is_size(number), f"lr must be a finite number of at least 0, got {number!r}")
    two = isinstance(betas, (tuple, list)) and len(betas) == 2
    require(two and all(_is_size(b) and b < 1 for b in betas), f"betas must be two numbers in [0, 1), got {betas!r}")
    require(_is_size(eps), f"eps must be a finite number of at least 0, got {eps!r}")
    require(_is_size(decay), f"weight_decay must be a finite number of at least 0, got {decay!r}")
    interval = group["refresh_interval"]
    require(
        interval is None or (isinstance(interval, int) and interval >= 1),
        f"refresh_interval must be a number of steps or None, got {interval!r}",
    )
    bound = group.get("refresh_drift")  # State dicts and pickles of version 0.1 lack it.
    require(
        bound is None or (_is_size(bound) and not isinstance(bound, bool) and bound <= 1),
        f"refresh_drift must be a share of entries from 0 to 1 or None, got {bound!r}",
    )
    schedule = group["refresh_schedule"]
    require(schedule in ("all", "spread"), f"refresh_schedule must be 'all' or 'spread', got {schedule!r}")
    bias, master, rounding = group["bias_correction"], group["master"], group["rounding"]
    require(bias in ("global", "per_entry"), f"bias_correction must be 'global' or 'per_entry', got {bias!r}")
    if bias == "per_entry":
        last_age(*betas)
    require(master in ("fp32", "split", None), f"master must be 'fp32', 'split' or None, got {master!r}")
    require(rounding in ("nearest", "stochastic"), f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    require(
        rounding == "nearest" or master is None,
        "rounding='stochastic' needs master=None: a master is rounded to nearest",
    )
    require(
        group["state_dtype"] in (*MOMENT_DTYPES, EIGHT_BIT),
        f"state_dtype must be torch.float32, torch.bfloat16 or {EIGHT_BIT!r}, got {group['state_dtype']!r}",
        TypeError,
    )
    for option in ("maximize", "capturable"):
        require(isinstance(group[option], bool), f"{option} must be True or False, got {group[option]!r}", TypeError)
    offload = group.get("offload")  # State dicts and pickles of earlier versions lack it.
    require(offload in (None, "cpu"), f"offload must be 'cpu' or None, got {offload!r}")
    require(
        offload is None or not group["capturable"],
        f"capturable=True cannot work with offload={offload!r}: a CUDA graph replays no step on the CPU; leave one out",
    )
    require(group["lift"] in (True, False, None), f"lift must be True, False or None, got {group['lift']!r}")


def _is_size(value: Any) -> bool:
    """Whether an option is a finite number of at least 0. Files of settings may give text."""
    return isinstance(value, Real) and 0 <= float(value) < math.inf


def warn_of_overridden(options: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Say which options of masks no group follows, because `pack_gradients` has given it others.

    Args:
        options: those of a whole optimizer.
    """
    for option, default in (("rank", None), ("density", 0.05), ("budget_rank", None)):
        value, own = options[option], [group[option] for group in groups if group["lift"] is not False]
        if value != default and own and value not in own:
            logger.warning(
                "%s=%r of LiftAdamW has no effect, because its groups have %s=%r of their own; give it to "
                "pack_gradients, or in the groups",
                *(option, value, option, own[0]),
            )


def check_masks(group: dict[str, Any], selection: Any, names: Sequence[str]) -> None:
    """Raise ValueError if the selection of entries cannot serve the masks of a checked group."""
    bound = group.get("refresh_drift")
    require(
        bound is None or selection == "principal",
        f"refresh_drift={bound} predicts the drift of principal weights; leave it None with selection={selection!r}",
    )
    for p, name in zip(group["params"], names):
        if is_sparse(trainable := trainable_of(p), group):
            matrix = trainable.matrix
            check_entries_left(selection, matrix.shape[-2:].numel(), mask_size(matrix, group, name)[1], name)
    packed = [name for p, name in zip(group["params"], names) if trainable_of(p).indices is not None]
    if packed and selection == "gradient" and group["refresh_interval"] is not None:
        raise ValueError(
            f"{packed[0]}: selection='gradient' needs dense gradients at each refresh, and these are packed; keep the "
            "masks of pack_gradients by refresh_interval=None, or use lift_param_groups"
        )


def check_settings(
    selection: Any,
    max_grad_norm: float | None,
    backend: str | None,
    mask_method: str,
    warm_start: str | None,
    seed: int,
) -> None:
    """Raise, naming option and value, for a setting of a whole optimizer that cannot work."""
    check_selection(selection)
    check_seed(seed)
    require(
        max_grad_norm is None or (isinstance(max_grad_norm, Real) and float(max_grad_norm) > 0),
        f"max_grad_norm must be a positive number or None, got {max_grad_norm!r}",
    )
    require(
        backend is None or backend in dispatch.NAMES,
        f"unknown backend {backend!r}; choose one of {', '.join(dispatch.NAMES)}",
    )
    require(mask_method in METHODS, f"unknown mask_method {mask_method!r}; choose one of {', '.join(METHODS)}")
    require(warm_start in ("device", "cpu", None), f"warm_start must be 'device', 'cpu' or None, got {warm_start!r}")


def check_parameters(group: dict[str, Any], names: Sequence[str], backend: str | None) -> list[str]:
    """Raise, naming the parameter, unless a group's options can train all of its parameters.

    Returns the names of those that LIFT trains.
    """
    for p, name in zip(group["params"], names):
        _check_parameter(p, group, name, backend)
    sparse = [name for p, name in zip(group["params"], names) if is_sparse(trainable_of(p), group)]
    if group["lift"] is None:
        _warn(
            [name for p, name in zip(group["params"], names) if _is_dense_stack(p)],
            "3-D parameters are trained densely, for example %s; a group with lift=True trains the principal "
            "weights of each of their matrices, and one with lift=False keeps them dense",
        )
        _warn(
            [name for name in sparse if _EMBEDDING.search(name) is not None],
            "matrices look like embeddings or heads, which the paper leaves out, for example %s; use "
            "lift_param_groups(model), or say lift=True or lift=False in their group",
        )
    return sparse


def _warn(names: Sequence[str], text: str) -> None:
    """One line about some parameters, with their number and an example."""
    if names:
        logger.warning(f"%d {text}", len(names), names[0])


def _check_parameter(parameter: Tensor, group: dict[str, Any], name: str, backend: str | None) -> None:
    trainable = trainable_of(parameter)
    if not is_sparse(trainable, group):
        require(
            not trainable.packed and not trainable.hooked,
            f"{name} has packed gradients, which lift=False cannot train; unpack(model) first",
        )
        return
    matrix = trainable.matrix
    check_matrix(matrix, name)
    if backend is not None:
        dispatch.choose(backend, parameter.device, "sparse_adamw_")
    mask_size(matrix, group, name)
    require(
        group["rounding"] == "nearest" or matrix.dtype != torch.float32,
        f"{name}: rounding='stochastic' is for bfloat16 and float16 weights, got {matrix.dtype}; use 'nearest'",
    )
    require(
        group["master"] != "split" or matrix.dtype == torch.bfloat16,
        f"{name}: master='split' keeps the low halves of masters beside bfloat16 weights, and these are "
        f"{matrix.dtype}; use master='fp32', or convert the model to bfloat16",
    )
    require(
        not trainable.packed or group["master"] is not None or parameter.dtype != torch.float32,
        f"{name}: fp32 values of a packed layer are its masters, so master=None cannot work; leave it out, give "
        "pack_gradients grad_dtype=torch.bfloat16, or use lift_param_groups",
    )


def _is_dense_stack(parameter: Tensor) -> bool:
    """Whether a parameter with an ordinary gradient looks like stacked experts."""
    sides = parameter.shape
    return len(sides) == 3 and sides[0] > 1 and min(sides[1:]) >= _STACK_SIDE and not trainable_of(parameter).hooked


def is_sparse(trainable: Trainable, group: dict[str, Any]) -> bool:
    """Whether LIFT trains this parameter.

    The group's ``lift`` decides. Where it is None, LIFT trains matrices and packed gradients.
    """
    if group["lift"] is not None:
        return group["lift"]
    return trainable.parameter.dim() == 2 or trainable.packed or trainable.hooked


def mask_size(matrix: Tensor, group: dict[str, Any], name: str) -> tuple[int, int]:
    """The rank with which a group selects entries of a matrix, and how many: r and k.

    Both are those of each matrix of a 3-D batch. Raises, naming the matrix, for one out of range.
    """
    k = trained_entries(matrix.shape, group["density"], group["budget_rank"], name)
    return mask_rank(matrix.shape, group["rank"], name), k
