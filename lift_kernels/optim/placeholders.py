"""Saved keys of a parameter before it has any state: the same keys and shapes from the start.

torch.distributed.checkpoint loads what the present state dict names, into tensors of the shapes
that these have. So a new optimizer names all that a trained one would save. A placeholder stands
for what is not there yet: for a whole matrix, an index list of -1 throughout; for a parameter that
is trained densely, a step of 0. Loading it is as if nothing had been loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks import costs
from ..nn import weight_sample
from ..nn.trainable import Trainable, trainable_of
from ..ops.state_formats import groups_of
from . import drift
from .hyperparameters import is_sparse, mask_size
from .mask_options import MaskOptions
from .matrix_ref import master_form
from .state_conversion import EIGHT_BIT, SCALES, STARTS, moment_dtypes

VERSION = 1
"""Version of the saved form. It is stored with each matrix, where tools that move state keep it."""
_WARM = ("basis", "threshold")
_DENSE = ("step", "exp_avg", "exp_avg_sq")
_OPTIONAL = (*_WARM, *drift.STATE_KEYS, STARTS, "matrix_shape", "version")
"""What the state of a matrix with a mask may lack, and its saved form has."""


class _Part(NamedTuple):
    """Shape and dtype of a saved tensor, and the values of its placeholder."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nothing: float | tuple[int, ...] = 0.0

    def placeholder(self) -> Tensor:
        return torch.tensor(self.nothing, dtype=self.dtype).expand(self.shape).clone()


class ParameterState(dict):
    """What ``optimizer.state`` holds of a parameter. Iterating gives the keys of its saved form.

    torch's ``set_state_dict`` does that to find the parameter's part of a flattened state dict. A
    key that is not there yet gives a placeholder. ``keys``, ``items``, ``in`` and ``len`` know what
    is there now.
    """

    saved: Mapping[str, _Part] = MappingProxyType({})

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved or self.keys())

    def __missing__(self, key: str) -> Tensor:
        if key not in self.saved:
            raise KeyError(key)
        return self.saved[key].placeholder()


def announce(
    state: dict[Tensor, Any], groups: Sequence[dict[str, Any]], options: MaskOptions, *, every: bool = False
) -> None:
    """Let ``optimizer.state`` have an entry for every parameter of ``groups``, with its saved keys.

    So it is never empty. torch would fill an empty one by a step, which makes masks. The groups get
    the seed: tools that move optimizer state keep what groups hold.

    Args:
        every: these are all groups, so empty entries of other parameters go.
    """
    if every:
        present = {p for group in groups for p in group["params"]}
        for p in [p for p, entry in state.items() if not entry and p not in present]:
            del state[p]
    for group in groups:
        group["seed"] = options.seed
        for p in group["params"]:
            entry = state.get(p, {})
            if not isinstance(entry, ParameterState):
                entry = state[p] = ParameterState(entry)
            entry.saved = _parts(trainable_of(p), group, options, entry)


def completed(entry: dict[str, Any], p: Tensor, group: dict[str, Any], options: MaskOptions) -> dict[str, Any]:
    """The state of a parameter, with placeholders for what is not there.

    Bases and thresholds that these options make no use of are left out.
    """
    parts = _parts(trainable_of(p), group, options, entry)
    if "indices" not in parts:
        return dict(entry) or {key: part.placeholder() for key, part in parts.items()}
    filled = {key: part.placeholder() for key, part in parts.items() if key in _OPTIONAL or "indices" not in entry}
    kept = {key: value for key, value in entry.items() if key not in _WARM or key in parts}
    return {**filled, **kept}


def without_placeholders(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict without placeholders. A parameter that has nothing else has no entry.

    There is one wait for each device.
    """
    # torch gives {} for a key of a flattened state dict that was not saved.
    entries = {
        i: {key: value for key, value in entry.items() if not (isinstance(value, dict) and not value)}
        for i, entry in state_dict["state"].items()
    }
    marks = {(i, key): mark for i, entry in entries.items() for key, mark in _marks(entry).items()}
    numbers = read_together(marks)
    for i, entry in entries.items():
        nothing = {key for key in entry if numbers.get((i, key)) == [1]}
        if "indices" in nothing or ("indices" not in entry and nothing == entry.keys()):
            entries[i] = {}
        elif "indices" in entry:
            nothing |= {"drift_values"} if "drift_rate" in nothing else set()
            entries[i] = {key: value for key, value in entry.items() if key not in nothing}
    return {**state_dict, "state": {i: entry for i, entry in entries.items() if entry}}


def _marks(entry: dict[str, Any]) -> dict[str, Tensor]:
    """Whether tensors hold what placeholders hold, as (1,) tensors, by key."""
    held = {"indices": -1, "basis": 0, "threshold": -1, "drift_rate": 0}
    held = held if "indices" in entry else dict.fromkeys(_DENSE, 0)
    given = {key: torch.as_tensor(entry[key]) for key in held if isinstance(entry.get(key), (Tensor, int, float))}
    marks = {key: (value == held[key]).all().reshape(1) for key, value in given.items()}
    sample = entry.get(weight_sample.KEY)
    if isinstance(sample, Tensor) and sample.numel():
        marks[weight_sample.KEY] = sample.isnan().all().reshape(1)
    return marks


def read_together(tensors: Mapping[Any, Tensor]) -> dict[Any, list[int]]:
    """The numbers of small tensors, by key, with one wait for each device."""
    read: dict[Any, list[int]] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        there = {key: tensor.reshape(-1) for key, tensor in tensors.items() if tensor.device == device}
        numbers = iter(torch.cat([tensor.long() for tensor in there.values()]).tolist())
        read |= {key: [next(numbers) for _ in range(len(tensor))] for key, tensor in there.items()}
    return read


def _parts(kind: Trainable, group: dict[str, Any], options: MaskOptions, entry: dict[str, Any]) -> dict[str, _Part]:
    """What is saved of a parameter, by key."""
    matrix, has_mask = kind.matrix, "indices" in entry
    if matrix.dim() < 2 or not (has_mask or is_sparse(kind, group)):
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), _Part(tuple(matrix.shape), matrix.dtype))
        return {"step": _Part((), torch.float32), **moments}
    rank, k = mask_size(matrix, group, kind.name or "a matrix")
    stack = tuple(matrix.shape[:-2])
    n = entry["indices"].numel() if has_mask else k * math.prod(stack)
    fp32, state_dtype = torch.float32, group["state_dtype"]
    parts = {"matrix_shape": _Part((matrix.dim(),), torch.int64, tuple(matrix.shape))}
    parts |= {
        "version": _Part((), torch.int64, VERSION),
        "step": _Part((), fp32),
        "indices": _Part((n,), torch.int32, -1),
    }
    first, second = moment_dtypes(state_dtype)
    parts |= {"exp_avg": _Part((n,), first), "exp_avg_sq": _Part((n,), second)}
    if state_dtype == EIGHT_BIT:
        parts |= dict.fromkeys(SCALES, _Part((groups_of(n),), fp32)) | {STARTS: _Part((1,), torch.int64)}
    if master_form(kind, group) is not None:
        parts["master"] = _Part((n,), fp32)
    if group["bias_correction"] == "per_entry":
        parts["births"] = _Part((n,), torch.int32)
    if options.selection == "principal" and options.warm_start is not None:
        parts["threshold"] = _Part(stack, fp32, -1)
        width = _basis_width(matrix.shape[-2:], rank, options.method)
        if width:
            parts["basis"] = _Part((*stack, min(matrix.shape[-2:]), width), torch.bfloat16)
    if group.get("refresh_drift") is not None:
        parts |= {"drift_values": _Part((drift.sample_size(n),), fp32), "drift_rate": _Part((), torch.float64)}
    size = weight_sample.sample_size(matrix.shape, n)
    return parts | {weight_sample.KEY: _Part((size,), matrix.dtype, math.nan)}


def _basis_width(shape: torch.Size, rank: int, method: str) -> int:
    """Columns of the basis that a mask leaves for a warm start; 0 where it leaves none.

    One device may take the method that leaves a basis and another not. It is counted then, so that
    a state goes from one to the other.
    """
    if method == "svd" or costs.block_width(shape, rank) == min(shape):
        return 0
    iterated = method == "chebyshev" or costs.may_leave_basis(shape, rank)
    return costs.block_width(shape, rank, warm=True) if iterated else 0
