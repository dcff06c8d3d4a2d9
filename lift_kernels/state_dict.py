"""The saved form of LiftAdamW's state: compact copies of plain types, and the checks of a loaded one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import MOMENT_DTYPES, check_index_list, require
from .lowrank import check_basis
from .options import OPTIONS, check_group

VERSION = 1
"""Of the saved form; stored with each matrix, where every tool that moves optimizer state about keeps it."""


def compact(entry: dict[str, Any], shape: torch.Size | None = None) -> dict[str, Any]:
    """Clones without a shared storage; with ``shape``, that of the matrix and the version of the form are added."""
    out = {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
    return out if shape is None else {**out, "shape": list(shape), "version": VERSION}


def check_state_dict(state_dict: dict[str, Any], parameters: list[Tensor], sparse: list[bool], names: list[str]) -> None:
    """Raise ValueError, TypeError or IndexError unless the state fits the parameters, in order."""
    require("state" in state_dict and "param_groups" in state_dict,
            f"a state dict holds 'state' and 'param_groups', got {sorted(state_dict)}")  # fmt: skip
    saved = sum(len(group["params"]) for group in state_dict["param_groups"])
    require(saved == len(parameters), f"the state dict is of a model with {saved} parameters, this optimizer has {len(parameters)}")
    for group in state_dict["param_groups"]:
        missing = sorted(OPTIONS - group.keys())
        require(not missing, f"a group of the state dict lacks {', '.join(missing)}; was it saved by another optimizer?")
        check_group(group)
    for i, entry in state_dict["state"].items():
        require(0 <= i < len(parameters), f"the state dict has an entry for parameter {i} of {len(parameters)}")
        p, name = parameters[i], names[i]
        if not sparse[i]:
            require("indices" not in entry, f"{name}: the state dict holds a LIFT mask, but this parameter is trained densely")
            for key in ("exp_avg", "exp_avg_sq"):
                held = tuple(entry[key].shape) if key in entry else tuple(p.shape)
                require(held == tuple(p.shape),
                        f"{name}: {key} of the state dict has shape {held}, this parameter {tuple(p.shape)}")  # fmt: skip
            continue
        require("indices" in entry, f"{name}: the state dict holds no index list; was it saved by another optimizer?")
        version = entry.get("version", VERSION)
        require(version == VERSION,
                f"{name}: the state dict has version {version}, this package reads {VERSION}; update lift_kernels")  # fmt: skip
        shape = tuple(entry.get("shape", p.shape))
        require(shape == tuple(p.shape), f"{name}: the state dict is of a matrix of shape {shape}, this one is {tuple(p.shape)}")
        check_index_list(entry["indices"], p.numel(), name)
        basis, threshold = entry.get("basis"), entry.get("threshold")
        for part in [] if basis is None else [basis] if p.dim() == 2 else basis:
            check_basis(part, p.shape[-2:], 1, name)
        numbers = 1 if p.dim() == 2 else len(p)
        require(threshold is None or threshold.numel() == numbers,
                f"{name}: threshold must hold {numbers} numbers, got {getattr(threshold, 'shape', threshold)}")  # fmt: skip
        require("step" in entry, f"{name}: the state dict holds no step")
        step = torch.as_tensor(entry["step"])
        require(step.numel() == 1, f"{name}: step must be one number, got shape {tuple(step.shape)}")
        for key, dtypes in {"exp_avg": MOMENT_DTYPES, "exp_avg_sq": MOMENT_DTYPES, "master": (torch.float32,),
                            "births": (torch.int32,)}.items():  # fmt: skip
            value = entry.get(key)
            require(value is not None or key in ("master", "births"), f"{name}: the state dict holds no {key}")
            if value is not None:
                require(value.shape == entry["indices"].shape,
                        f"{name}: {key} has {value.numel()} entries, its index list {entry['indices'].numel()}")  # fmt: skip
                require(value.dtype in dtypes,
                        f"{name}: {key} must be one of {', '.join(map(str, dtypes))}, got {value.dtype}", TypeError)  # fmt: skip
