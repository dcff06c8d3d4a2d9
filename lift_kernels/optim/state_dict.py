"""The saved form of LiftAdamW's state, and the checks of a state that is loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..masks.lowrank import check_basis
from ..nn import weight_sample
from ..nn.trainable import trainable_of
from ..validation import MOMENT_DTYPES, check_index_form, check_index_lists, require
from . import drift
from .hyperparameters import OPTIONS, check_group, is_sparse
from .mask_options import MaskOptions
from .matrix_table import MatrixTable
from .placeholders import VERSION, completed, read_together
from .state_conversion import EIGHT_BIT, SCALES, check_scales, whole_master

_OURS = "give what LiftAdamW.state_dict() returned"
_DTYPES = {
    "exp_avg": (*MOMENT_DTYPES, torch.int8),
    "exp_avg_sq": (*MOMENT_DTYPES, torch.uint8),
    "master": (torch.float32,),
    "births": (torch.int32,),
}
"""Dtypes that the buffers of a matrix may have, by name."""


def compact(entry: dict[str, Any], *, host: bool = False) -> dict[str, Any]:
    """A copy of a parameter's state that shares no storage with it.

    Args:
        host: copy to host memory, so that a card does not hold the state twice. Otherwise tensors
            are cloned where they are.
    """
    return {key: _copied(value, host) if isinstance(value, Tensor) else value for key, value in entry.items()}


def _copied(tensor: Tensor, host: bool) -> Tensor:
    return tensor.to("cpu") if host and tensor.device.type != "cpu" else tensor.clone()


def saved_form(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], samples: dict[int, Tensor], options: MaskOptions
) -> dict[str, Any]:
    """torch's state dict with copies of the state, and with all of its keys.

    All that an entry holds is a tensor: torch.distributed.checkpoint does not write other values
    back under a position, and it cannot flatten a list.

    Args:
        groups: of the optimizer.
        samples: of the weights of matrices with a mask (`weight_sample`), by position.
    """
    members = [(p, group) for group in groups for p in group["params"]]
    entries = state_dict["state"]
    for i, (p, group) in enumerate(members):
        if i in entries:
            entry = completed(entries[i], p, group, options)
            entry |= {weight_sample.KEY: samples[i]} if i in samples else {}
            if "master" in entry and "indices" in entry:
                entry["master"] = whole_master(entry["master"], trainable_of(p).matrix, entry["indices"])
            entries[i] = compact(entry, host=True)
    for group in state_dict["param_groups"]:
        if "param_names" in group:
            group["param_names"] = list(group["param_names"])  # torch shares the list with the optimizer.
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()  # torch shares this too.
    return state_dict


def _check_groups(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError or TypeError unless groups have all options, in their range."""
    for group in groups:
        missing = sorted(OPTIONS - group.keys())
        require(
            not missing,
            f"a group of the state dict lacks {', '.join(missing)}, so another optimizer has saved it; {_OURS}",
        )
        check_group(group)


def check_state_dict(
    state_dict: dict[str, Any], parameters: list[Tensor], sparse: list[bool], names: list[str]
) -> None:
    """Raise ValueError, TypeError or IndexError unless the state fits the parameters.

    It is in the order that `in_own_order` gives. ``sparse`` says which parameters LIFT trains. The
    content of the index lists is checked last. There are two waits for each device.
    """
    state = state_dict["state"]
    for i, entry in state.items():
        _check_types(entry, names[i])
    keys = [(i, key) for i, entry in state.items() for key in ("matrix_shape", "version") if key in entry]
    numbers = read_together({(i, key): torch.as_tensor(state[i][key]) for i, key in keys})
    for i, entry in state.items():
        if sparse[i]:
            (version,) = numbers.get((i, "version"), [VERSION])
            _check_sparse(entry, version, numbers.get((i, "matrix_shape")), parameters[i], names[i])
        else:
            _check_dense(entry, parameters[i], names[i])
    matrices = [i for i in state if sparse[i]]
    check_index_lists(
        [state[i]["indices"] for i in matrices],
        [parameters[i].numel() for i in matrices],
        [names[i] for i in matrices],
    )


def _check_types(entry: dict[str, Any], name: str) -> None:
    """Raise unless an entry holds tensors, and one number as its step."""
    for key, value in entry.items():
        number = key in ("step", "version") and isinstance(value, (int, float))
        require(
            isinstance(value, Tensor) or number or key == "shape",
            f"{name}: {key} of the state dict must be a tensor, got {type(value).__name__}; {_OURS}",
            TypeError,
        )
    if "step" in entry:
        step = torch.as_tensor(entry["step"])
        require(step.numel() == 1, f"{name}: step of the state dict must be one number, got {tuple(step.shape)}")


def _check_dense(entry: dict[str, Any], p: Tensor, name: str) -> None:
    """Raise unless the entry is empty or fits a parameter that is trained densely."""
    require(
        "indices" not in entry,
        f"{name}: the state dict holds a LIFT mask, but this parameter is trained densely; build the optimizer with "
        "the groups that were saved",
    )
    for key in ("step", "exp_avg", "exp_avg_sq") if entry else ():
        require(key in entry, f"{name}: the state dict holds no {key}; {_OURS}")
        held = tuple(p.shape) if key == "step" else tuple(entry[key].shape)
        require(
            held == tuple(p.shape),
            f"{name}: {key} of the state dict has shape {held}, this parameter {tuple(p.shape)}; build the optimizer "
            "from the model that was saved",
        )


def _check_sparse(entry: dict[str, Any], version: int, shape: Sequence[int] | None, matrix: Tensor, name: str) -> None:
    """Raise unless the entry fits a matrix, but for the content of its index list."""
    require(
        "indices" in entry, f"{name}: the state dict holds no index list, so another optimizer has saved it; {_OURS}"
    )
    require(
        version == VERSION,
        f"{name}: the state dict has version {version}, this package reads {VERSION}; update lift_kernels",
    )
    shape = entry.get("shape", matrix.shape) if shape is None else shape  # a list, up to version 0.1
    require(
        isinstance(shape, (list, tuple)), f"{name}: shape of the state dict must be a list, got {shape!r}", TypeError
    )
    require(
        tuple(shape) == tuple(matrix.shape),
        f"{name}: the state dict is of a matrix of shape {tuple(shape)}, this one is {tuple(matrix.shape)}; build the "
        "optimizer from the model that was saved",
    )
    check_index_form(entry["indices"], name)
    _check_warm_start(entry, matrix, name)
    drift.check_saved(entry, name)
    require("step" in entry, f"{name}: the state dict holds no step; {_OURS}")
    _check_buffers(entry, name)
    if weight_sample.KEY in entry:
        weight_sample.check_sample(entry[weight_sample.KEY], entry["indices"].numel(), name)


def _check_warm_start(entry: dict[str, Any], matrix: Tensor, name: str) -> None:
    """Raise unless basis and threshold, where there are some, fit the matrix or its batch."""
    basis, threshold = entry.get("basis"), entry.get("threshold")
    for part in [] if basis is None else [basis] if matrix.dim() == 2 else basis:
        check_basis(part, matrix.shape[-2:], 1, name)
    numbers = 1 if matrix.dim() == 2 else len(matrix)
    require(
        threshold is None or threshold.numel() == numbers,
        f"{name}: threshold of the state dict must hold {numbers} numbers, got "
        f"{getattr(threshold, 'shape', threshold)}",
    )


def _check_buffers(entry: dict[str, Any], name: str) -> None:
    """Raise unless moments, masters and ages have the index list's length and a right dtype."""
    for key, dtypes in _DTYPES.items():
        value = entry.get(key)
        require(value is not None or key in ("master", "births"), f"{name}: the state dict holds no {key}; {_OURS}")
        if value is not None:
            require(
                value.shape == entry["indices"].shape,
                f"{name}: {key} of the state dict has {value.numel()} entries, its index list "
                f"{entry['indices'].numel()}; {_OURS}",
            )
            require(
                value.dtype in dtypes,
                f"{name}: {key} of the state dict must be one of {', '.join(map(str, dtypes))}, got {value.dtype}; "
                f"{_OURS}",
                TypeError,
            )
    require(
        (entry["exp_avg"].dtype == torch.int8) == (entry["exp_avg_sq"].dtype == torch.uint8),
        f"{name}: exp_avg and exp_avg_sq of the state dict must both be 8-bit codes or both be none, got "
        f"{entry['exp_avg'].dtype} and {entry['exp_avg_sq'].dtype}; {_OURS}",
        TypeError,
    )
    if entry["exp_avg"].dtype == torch.int8:
        check_scales(entry, name)


def _check_codable(entry: dict[str, Any], group: dict[str, Any], name: str) -> None:
    """Raise if moments that are to be put into 8-bit codes are not finite."""
    if group["state_dtype"] != EIGHT_BIT or "indices" not in entry:
        return
    for key in ("exp_avg", "exp_avg_sq", *SCALES):
        require(
            key not in entry or not entry[key].is_floating_point() or bool(entry[key].isfinite().all()),
            f"{name}: {key} of the state dict is not finite, and 8-bit moments cannot hold that; load an earlier "
            "checkpoint, or set state_dtype=torch.float32",
        )


def check_fits(state_dict: dict[str, Any], parameters: Sequence[Tensor], table: MatrixTable) -> None:
    """Raise, naming the parameter, unless a state in own order fits an optimizer's parameters."""
    refs = {ref.parameter: ref for ref in table.refs}
    names = {ref.parameter: ref.name for ref in table.refs} | {ref.parameter: ref.name for ref in table.dense}
    _check_groups(state_dict["param_groups"])
    saved_groups = (group for group in state_dict["param_groups"] for _ in group["params"])
    for p, group in zip(parameters, saved_groups):
        require(
            is_sparse(trainable_of(p), group) == (p in refs),
            f"{names[p]}: lift={group['lift']} in the state dict, but this optimizer trains it "
            f"{'sparsely' if p in refs else 'densely'}; build the optimizer with the groups that were saved",
        )
    matrices = [refs[p].trainable.matrix if p in refs else p for p in parameters]
    check_state_dict(state_dict, matrices, [p in refs for p in parameters], [names[p] for p in parameters])
    saved_groups = (group for group in state_dict["param_groups"] for _ in group["params"])
    for i, (p, group) in enumerate(zip(parameters, saved_groups)):
        _check_codable(state_dict["state"].get(i, {}), group, names[p])


def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What the hooks before `load_state_dict` make of a state dict, a copy."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def load_dense(optimizer: Optimizer, load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """Let torch load the options, and a copy of the state of parameters that LIFT does not train.

    torch would train the tensors of the state dict itself, so a second load would get moments that
    have moved. It would cast other floating state to the parameter's dtype. The load hooks of the
    optimizer do not run: they see the whole state, before or after.

    Args:
        load: ``torch.optim.Optimizer.load_state_dict`` of the optimizer.
        state_dict: in own order.
    """
    dense = {i: compact(entry) for i, entry in state_dict["state"].items() if "indices" not in entry}
    hooks = optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks
    optimizer._optimizer_load_state_dict_pre_hooks = OrderedDict()
    optimizer._optimizer_load_state_dict_post_hooks = OrderedDict()
    try:
        load({**state_dict, "state": dense})
    finally:
        optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks = hooks
    for p, entry in optimizer.state.items():  # The fused step needs its count on the parameter's device.
        if "step" in entry:
            entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32, device=p.device).reshape(())
