"""Packed gradients that hooks make, averaged over the ranks that hold replicas.

DistributedDataParallel leaves hooked parameters out, because the hook has taken the gradient before
it could be reduced.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..distributed.averages import average
from ..distributed.replicas import Replicas
from ..nn.trainable import trainable_of
from ..ops import dispatch
from .matrix_ref import MatrixRef


def check_group_of_hooked(parameters: Sequence[Tensor], names: Sequence[str], replicas: Replicas) -> None:
    """Raise RuntimeError, naming a hooked parameter, if nobody says which ranks hold replicas."""
    if replicas.ungrouped:
        for p, name in zip(parameters, names):
            if trainable_of(p).hooked:
                _refuse(name)


def average_hooked(hooked: Sequence[MatrixRef], replicas: Replicas) -> None:
    """Replace the packed gradient of each matrix by its mean over the ranks.

    Every rank takes part at every step. A rank without a gradient counts as one with zeros. Where
    no rank has a gradient, none gets one.

    Raises RuntimeError or ValueError, naming the matrix, for a gradient that cannot be used, and
    where several ranks run and nobody says which of them hold replicas.
    """
    if not hooked:
        return
    if replicas.ungrouped:  # The process group came after the optimizer, or a copy has lost its own.
        _refuse(hooked[0].name)
    group = replicas.group
    if group is None:
        return
    gradients = [grad if packed else None for grad, packed in (ref.trainable.gradient(ref.name) for ref in hooked)]
    if dispatch.capturing():  # `gradient` has refused packed ones.
        return
    lists = [ref.parameter.lift_indices for ref in hooked]  # type: ignore[attr-defined]
    means = average(gradients, [len(i) for i in lists], [i.device for i in lists], group)
    for ref, mean in zip(hooked, means):
        ref.parameter.lift_grad = mean  # type: ignore[attr-defined]


def _refuse(name: str) -> None:
    raise RuntimeError(
        f"{name}: a hook packs its gradient, which DistributedDataParallel then does not average, and LiftAdamW does "
        "not know which ranks hold replicas; name them by LiftAdamW(process_group=...), e.g. "
        "torch.distributed.group.WORLD, say process_group='independent' if ranks are meant to differ, or keep it from "
        "pack_gradients (extra=, exclude=)"
    )
