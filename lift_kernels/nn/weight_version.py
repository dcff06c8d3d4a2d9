"""The one rule for weights that change outside the optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WeightVersion(NamedTuple):
    """Address and version counter of a weight. Another pair means that the weight was written."""

    address: int
    version: int

    @classmethod
    def of(cls, weight: Tensor) -> WeightVersion:
        """The present pair of a weight."""
        return cls(weight.data_ptr(), weight._version)


def update_stale(values: Tensor, present: Tensor) -> bool:
    """Let fp32 ``values`` follow the entries ``present`` of a weight.

    Returns whether any value changed.

    A value that rounds to the weight's entry keeps all its bits. So loading a checkpoint of the
    model after that of the optimizer loses nothing.
    """
    stale = values.to(present.dtype) != present
    changed = bool(stale.any())
    if changed:
        values.copy_(torch.where(stale, present.float(), values))
    return changed
