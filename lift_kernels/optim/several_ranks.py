"""What the ranks that hold replicas do together in a step, beside the masks.

They average packed gradients of hooks, which DistributedDataParallel leaves out. They compare their
index lists, and tell each other of a state that belongs to other weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..distributed.agreement import Plan
from ..distributed.averages import average
from ..distributed.checksums import index_digests, weight_digests
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
    """Replace the packed gradient of each matrix, at least one, by its mean over the ranks.

    Every rank takes part at every step. A rank without a gradient counts as one with zeros. Where
    no rank has a gradient, none gets one.

    Raises RuntimeError or ValueError, naming the matrix, for a gradient that cannot be used, and
    where several ranks run and nobody says which of them hold replicas.
    """
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


def compare_lists(unseen: Iterable[MatrixRef], replicas: Replicas, masks_took: float) -> None:
    """Raise RuntimeError on every replica if their new index lists differ.

    Args:
        unseen: matrices with a new index list.
        masks_took: seconds that the masks took here.
    """
    if replicas.group is None:
        replicas.compare(_lists(unseen), masks_took)
    else:
        agree_on_entries(unseen, replicas)


def agree_on_entries(refs: Iterable[MatrixRef], replicas: Replicas) -> None:
    """Raise RuntimeError on every rank of the group unless all train the same entries of these."""
    lists = _lists(refs)
    fields = {name: {"entries": digest} for name, digest in index_digests(lists).items()}
    hooked = [ref for ref in refs if ref.trainable.hooked]  # DistributedDataParallel has not broadcast their weights.
    for ref, digest in zip(hooked, weight_digests([ref.trainable.matrix for ref in hooked])):
        fields[ref.name]["weights"] = digest
    replicas.agree(Plan(Plan.TRAINS, {}, list(fields.items())))


def _lists(refs: Iterable[MatrixRef]) -> dict[str, list[Tensor]]:
    """Index lists by name. Two matrices may share a name."""
    lists: dict[str, list[Tensor]] = {}
    for ref in refs:
        lists.setdefault(ref.name, []).append(ref.views()["indices"])
    return lists


def agree_on_loaded(refs: Iterable[MatrixRef], replicas: Replicas, error: Exception | None) -> None:
    """Raise on every rank of the group if a loaded state cannot be used on one of them.

    Args:
        refs: matrices whose state was loaded.
        error: why this rank cannot use it.
    """
    plan = Plan(Plan.LOADED, {}, [(ref.name, {}) for ref in refs], "" if error is None else str(error))
    replicas.agree(plan, error)


def _refuse(name: str) -> None:
    raise RuntimeError(
        f"{name}: a hook packs its gradient, which DistributedDataParallel then does not average, and LiftAdamW does "
        "not know which ranks hold replicas; name them by LiftAdamW(process_group=...), e.g. "
        "torch.distributed.group.WORLD, say process_group='independent' if ranks are meant to differ, or keep it from "
        "pack_gradients (extra=, exclude=)"
    )
