"""The one rule for weights that change outside the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops

logger = logging.getLogger("lift_kernels")


def weight_version(weight: Tensor) -> tuple[int, int]:
    """Address and version counter of a weight. Another pair means that the weight was written."""
    return weight.data_ptr(), weight._version


def regather(values: Tensor, weight: Tensor, indices: Tensor) -> bool:
    """Let ``values`` follow the entries of a weight at ``indices``.

    Returns whether any value changed.

    A value that rounds to the weight's entry keeps all its bits. So loading a checkpoint of the
    model after that of the optimizer loses nothing. So does one to which the entry rounds. Values
    may be on another device.
    """
    present = ops.packed_gather(weight.detach(), indices).to(values.device)
    coarse = values.dtype if values.dtype != torch.float32 else present.dtype
    stale = values.to(coarse) != present.to(coarse)
    changed = bool(stale.any())
    if changed:
        values.copy_(torch.where(stale, present.to(values.dtype), values))
    return changed


def follow_weight(
    seen: tuple[int, int] | None, values: Tensor, weight: Tensor, indices: Tensor
) -> tuple[tuple[int, int], bool]:
    """`regather` if the weight was written since it was ``seen``.

    Returns what is seen now, and whether values changed.
    """
    now = weight_version(weight)
    return now, now != seen and regather(values, weight, indices)


def warn_of_changed(names: Sequence[str], what: str) -> None:
    """Say in one line which weights were changed outside, and that ``what`` of them follow."""
    if names:
        others = f" and {len(names) - 1} more weights were" if len(names) > 1 else " was"
        logger.warning("%s%s changed outside the optimizer; %s", names[0], others, what)
