"""The one rule for weights that change outside the optimizer."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .. import ops

logger = logging.getLogger("lift_kernels")


def weight_version(weight: Tensor) -> tuple[int, int]:
    """Address and version counter of a weight. Another pair means that the weight was written."""
    return weight.data_ptr(), weight._version


def regather(values: Tensor, weight: Tensor, indices: Tensor) -> bool:
    """Let fp32 ``values`` follow the entries of a weight at ``indices``.

    Returns whether any value changed.

    A value that rounds to the weight's entry keeps all its bits. So loading a checkpoint of the
    model after that of the optimizer loses nothing.
    """
    present = ops.packed_gather(weight.detach(), indices)
    stale = values.to(present.dtype) != present
    changed = bool(stale.any())
    if changed:
        values.copy_(torch.where(stale, present.float(), values))
    return changed


def follow_weight(
    seen: tuple[int, int] | None, values: Tensor, weight: Tensor, indices: Tensor, name: str
) -> tuple[int, int]:
    """`regather` the values of a packed layer if its weight was written since it was ``seen``.

    If they change, a warning names the layer. Returns what is seen now.
    """
    now = weight_version(weight)
    if now != seen and regather(values, weight, indices):
        logger.warning("%s was changed outside the optimizer; its values follow the new weight", name)
    return now
