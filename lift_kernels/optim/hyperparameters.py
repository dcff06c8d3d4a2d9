"""Hyperparameters of a LiftAdamW group: their defaults and their checks."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ..masks.budget import check_rank, default_rank, trained_entries
from ..nn import trainable
from ..ops.bias_correction import last_age
from ..validation import MOMENT_DTYPES, check_matrix, require

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
        "maximize",
        "lift",
        "steps_since_refresh",
    }
)
"""What every group holds beside its parameters."""

_EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|lm_head|word_embeddings|shared)(\.|$)")


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError, naming option and value, for one out of range."""
    lr, betas, eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, f"a tensor lr must hold one number, got shape {tuple(lr.shape)}")
    else:
        require(0.0 <= lr < math.inf, f"lr must be a finite number of at least 0, got {lr}")
    require(len(betas) == 2 and all(0.0 <= b < 1.0 for b in betas), f"betas must be two numbers in [0, 1), got {betas}")
    require(0.0 <= eps < math.inf, f"eps must be a finite number of at least 0, got {eps}")
    require(0.0 <= decay < math.inf, f"weight_decay must be a finite number of at least 0, got {decay}")
    interval = group["refresh_interval"]
    require(
        interval is None or (isinstance(interval, int) and interval >= 1),
        f"refresh_interval must be a number of steps or None, got {interval!r}",
    )
    schedule = group["refresh_schedule"]
    require(schedule in ("all", "spread"), f"refresh_schedule must be 'all' or 'spread', got {schedule!r}")
    bias, master, rounding = group["bias_correction"], group["master"], group["rounding"]
    require(bias in ("global", "per_entry"), f"bias_correction must be 'global' or 'per_entry', got {bias!r}")
    if bias == "per_entry":
        last_age(*betas)
    require(master in ("fp32", None), f"master must be 'fp32' or None, got {master!r}")
    require(rounding in ("nearest", "stochastic"), f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    require(
        rounding == "nearest" or master is None,
        "rounding='stochastic' needs master=None: a master is rounded to nearest",
    )
    require(
        group["state_dtype"] in MOMENT_DTYPES,
        f"state_dtype must be torch.float32 or torch.bfloat16, got {group['state_dtype']}",
        TypeError,
    )
    require(group["lift"] in (True, False, None), f"lift must be True, False or None, got {group['lift']!r}")


def check_lift_parameter(parameter: Tensor, group: dict[str, Any], name: str) -> None:
    """Raise, naming the parameter, unless LIFT can train it with the group's rank and density."""
    check_matrix(parameter, name)
    check_rank(rank_of(parameter, group), parameter.shape[-2:], name)
    entries_of(parameter, group, name)
    require(
        group["rounding"] == "nearest" or parameter.dtype != torch.float32,
        f"{name}: rounding='stochastic' is for bfloat16 and float16 weights, got {parameter.dtype}",
    )


def is_sparse(parameter: Tensor, group: dict[str, Any]) -> bool:
    """Whether LIFT trains this parameter.

    The group's ``lift`` decides. Where it is None, LIFT trains matrices and packed gradients.
    """
    if group["lift"] is not None:
        return group["lift"]
    return parameter.dim() == 2 or trainable.is_values(parameter) or trainable.is_hooked(parameter)


def looks_like_embedding(name: str) -> bool:
    """Whether a parameter's name is that of an embedding table or an output head."""
    return _EMBEDDING.search(name) is not None


def rank_of(matrix: Tensor, group: dict[str, Any]) -> int:
    """The LRA rank with which a group selects entries of a matrix."""
    return default_rank(matrix.shape, group["rank"])


def entries_of(matrix: Tensor, group: dict[str, Any], name: str) -> int:
    """k of a matrix, or of each matrix of a 3-D batch."""
    return trained_entries(matrix.shape, group["density"], group["budget_rank"], name)
