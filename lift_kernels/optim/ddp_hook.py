"""A communication hook for DistributedDataParallel: only trained entries are averaged."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import packed_gather, packed_scatter_
from .lift_adamw import LiftAdamW


def trained_entries_hook(optimizer: LiftAdamW, bucket):
    """Average the trained entries of matrices, and set the rest of their gradients to zero.

    ``parallel.register_comm_hook(optimizer, trained_entries_hook)`` registers it for a model in
    matrix mode. At 5 % density a step sends 5 % of what it would send else. Other parameters are
    averaged whole. So are all gradients before the first masks, and, with ``selection="gradient"``,
    those of matrices that are due for a new mask after the step.

    The rest is zero because it differs between ranks, and so would norms: a clipped step would let
    replicas drift apart.

    Args:
        optimizer: the LiftAdamW, made with ``process_group=`` unless accelerate or Trainer runs
            DistributedDataParallel. It must be the group of DistributedDataParallel.
        bucket: a torch.distributed.GradBucket.

    Returns:
        A torch.futures.Future of the bucket's buffer. Nothing waits for the device.

    Raises TypeError for another state than a LiftAdamW, and RuntimeError where it does not know its
    ranks.
    """
    # The type of bucket stands in no annotation: DistributedDataParallel refuses it as a string.
    group = _group_of(optimizer)
    lists = _index_lists(optimizer, bucket.parameters())
    gradients, buffer = bucket.gradients(), bucket.buffer()
    sparse = any(indices is not None for indices in lists)
    flat, sizes = buffer, []
    if sparse:
        parts = [g.reshape(-1) if i is None else packed_gather(g, i) for g, i in zip(gradients, lists)]
        flat, sizes = torch.cat(parts), [len(part) for part in parts]
    flat.div_(dist.get_world_size(group))  # Before the sum, as torch's own hook, so that fp16 does not overflow.

    def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        if sparse:
            buffer.zero_()
            for gradient, indices, values in zip(gradients, lists, future.value()[0].split(sizes)):
                if indices is None:
                    gradient.copy_(values.view(gradient.shape))
                else:
                    packed_scatter_(gradient, indices, values)
        return buffer

    return dist.all_reduce(flat, group=group, async_op=True).get_future().then(put_back)


def _group_of(optimizer: Any) -> dist.ProcessGroup | None:
    """The ranks of the optimizer, or None for the default group of a single rank."""
    if not isinstance(optimizer, LiftAdamW):
        raise TypeError(
            "trained_entries_hook needs the LiftAdamW as its state, register_comm_hook(optimizer, "
            f"trained_entries_hook); got {type(optimizer).__name__}"
        )
    group = optimizer._replicas.group
    if group is None and dist.get_world_size() > 1:
        raise RuntimeError(
            "trained_entries_hook averages gradients over the ranks of its LiftAdamW, which has none; give "
            "LiftAdamW(process_group=...) the group of DistributedDataParallel, e.g. torch.distributed.group.WORLD"
        )
    return group


def _index_lists(optimizer: LiftAdamW, parameters: list[Tensor]) -> list[Tensor | None]:
    """The trained entries of each parameter, or None where its gradient is averaged whole."""
    table = optimizer._table
    table.follow(optimizer.param_groups)
    # Without all masks, some entries are not known yet, or masks are made from these gradients.
    matrices = [None if table.missing else table.matrix_with_mask(p) for p in parameters]
    if optimizer.selection == "gradient":
        due = optimizer._schedule.may_be_due_next
        matrices = [None if ref is None or due(ref, table.refs) else ref for ref in matrices]
        table.partial.difference_update(parameters)
        table.partial.update(ref.parameter for ref in matrices if ref is not None)
    return [None if ref is None else ref.arena.indices[ref.arena.segment(ref.row)] for ref in matrices]  # type: ignore
