"""State of one form put into another: moments in fp32, bf16 or 8 bits, masters whole or split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .. import ops
from ..ops.state_formats import GROUP, decode, encode_first, encode_root, groups_of, join_master, split_master
from ..validation import require

EIGHT_BIT = "8bit"
"""``state_dtype`` of 8-bit moments."""
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
"""Buffers of an arena that have an element for each group of entries."""
STARTS = "group_starts"
"""Key of a saved state of 8-bit moments: the places in its index list where parts
with groups of their own begin."""


def moment_dtypes(state_dtype: torch.dtype | str) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``exp_avg`` and ``exp_avg_sq``."""
    return (torch.int8, torch.uint8) if state_dtype == EIGHT_BIT else (state_dtype, state_dtype)  # type: ignore[return-value]


def moments_as(entry: Mapping[str, Tensor], state_dtype: torch.dtype | str) -> dict[str, Tensor]:
    """The moments of a state in the form of ``state_dtype``, with the scales of 8-bit ones.

    Those that have this form already keep their bits.

    Args:
        entry: holds ``exp_avg`` and ``exp_avg_sq`` (k,) and, of 8-bit moments, their scales. It may
            hold `STARTS`.
    """
    names = ("exp_avg", "exp_avg_sq", *SCALES)
    coded = entry["exp_avg"].dtype == torch.int8
    if state_dtype == EIGHT_BIT and coded and _starts(entry) == [0]:
        return {name: entry[name] for name in names}
    first, second = _widened(entry) if coded else (entry["exp_avg"].float(), entry["exp_avg_sq"].float())
    if state_dtype != EIGHT_BIT:
        return {name: x.to(state_dtype) for name, x in zip(names, (first, second))}  # type: ignore[arg-type]
    (first, first_scale), (root, root_scale) = encode_first(first), encode_root(second.sqrt())
    return dict(zip(names, (first, root, first_scale, root_scale)))


def _starts(entry: Mapping[str, Tensor]) -> list[int]:
    return entry[STARTS].tolist() if STARTS in entry else [0]


def _widened(entry: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """fp32 moments (k,) of 8-bit ones. Each part from a start to the next has groups of its own."""
    k, widened = entry["exp_avg"].numel(), []
    for name, scale in zip(("exp_avg", "exp_avg_sq"), SCALES):
        parts, group = [], 0
        for start, end in zip(_starts(entry), [*_starts(entry)[1:], k]):
            groups = groups_of(end - start)
            parts.append(decode(entry[name][start:end], entry[scale][group : group + groups]))
            group += groups
        widened.append(torch.cat(parts))
    return widened[0], widened[1].square()


def check_lengths(entry: Mapping[str, Tensor], keys: Iterable[str], name: str) -> None:
    """Raise, naming the matrix, unless these parts of a state are as long as its index list."""
    indices = entry["indices"]
    for key in keys:
        value = entry.get(key)
        require(
            value is None or value.shape == indices.shape,
            f"{name}: {key} has {getattr(value, 'numel', int)()} entries, its index list {indices.numel()}",
        )


def check_scales(entry: Mapping[str, Tensor], name: str) -> None:
    """Raise, naming the matrix, unless the scales of a saved state of 8-bit moments fit it."""
    k, starts = entry["exp_avg"].numel(), _starts(entry)
    require(
        starts[:1] == [0] and all(0 < step for step in _differences([*starts, max(k, 1)])),
        f"{name}: {STARTS} of the state dict must rise from 0 and stay below its {k} entries, got {starts}",
    )
    groups = sum(groups_of(count) for count in _differences([*starts, k]))
    for key in SCALES:
        require(key in entry, f"{name}: the state dict has 8-bit moments and no {key}")
        require(
            entry[key].shape == (groups,) and entry[key].dtype == torch.float32,
            f"{name}: {key} of the state dict must be {groups} float32 numbers, one for {GROUP} entries, got "
            f"{tuple(entry[key].shape)} {entry[key].dtype}",
        )


def _differences(numbers: list[int]) -> list[int]:
    return [after - before for before, after in zip(numbers, numbers[1:])]


def whole_master(master: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """fp32 masters (k,): ``master`` itself, or those whose low halves it holds beside a weight."""
    if master.dtype != torch.int16:
        return master
    return join_master(ops.packed_gather(weight.detach(), indices).to(master.device), master)


def master_as(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Masters in fp32 or as int16 low halves; low halves stay what they are."""
    return split_master(master.float()) if dtype == torch.int16 and master.dtype != dtype else master.to(dtype)
