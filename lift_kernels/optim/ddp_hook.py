"""A communication hook for DistributedDataParallel: only trained entries are averaged."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..nn import optimizer_hooks
from ..ops import packed_gather, packed_scatter_
from .lift_adamw import LiftAdamW
from .several_ranks import agree_on_entries


def trained_entries_hook(optimizer: LiftAdamW, bucket):
    """Average the trained entries of matrices, and set the rest of their gradients to zero.

    ``parallel.register_comm_hook(optimizer, trained_entries_hook)`` registers it for a model in
    matrix mode. At 5 % density a step sends 5 % of what it would send else. Other parameters are
    averaged whole. So are all gradients before the first masks, those of parameters that another
    LiftAdamW has taken, and, with ``selection="gradient"``, those of matrices that are due for a
    new mask after the step.

    The rest is zero because it differs between ranks, and so would norms: a clipped step would let
    replicas drift apart.

    Args:
        optimizer: the LiftAdamW, made with ``process_group=`` unless accelerate or Trainer runs
            DistributedDataParallel. It must be the group of DistributedDataParallel.
        bucket: a torch.distributed.GradBucket.

    Returns:
        A torch.futures.Future of the bucket's buffer. Nothing waits for the device.

    Raises TypeError for another state than a LiftAdamW, and RuntimeError where it does not know its
    ranks or these have loaded different states.
    """
    # The type of bucket stands in no annotation: DistributedDataParallel refuses it as a string.
    check_ranks(optimizer)
    group = optimizer._replicas.group
    lists = _index_lists(optimizer, bucket.parameters())
    gradients, buffer = bucket.gradients(), bucket.buffer()
    sparse = any(indices is not None for indices in lists)
    flat, sizes = buffer, []
    if sparse:
        parts = [g.reshape(-1) if i is None else packed_gather(g, i) for g, i in zip(gradients, lists)]
        flat, sizes = torch.cat(parts), [len(part) for part in parts]

    def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        if sparse:
            buffer.zero_()
            for gradient, indices, values in zip(gradients, lists, future.value()[0].split(sizes)):
                if indices is None:
                    gradient.copy_(values.view(gradient.shape))
                else:
                    packed_scatter_(gradient, indices, values)
        return buffer

    if group is None:  # This rank alone holds the model.
        alone: torch.futures.Future = torch.futures.Future(devices=[flat.device] if flat.is_cuda else None)
        alone.set_result([flat])
        return alone.then(put_back)
    flat.div_(dist.get_world_size(group))  # Before the sum, as torch's own hook, so that fp16 does not overflow.
    return dist.all_reduce(flat, group=group, async_op=True).get_future().then(put_back)


def register_where_useful(optimizer: LiftAdamW, model: Any) -> bool:
    """Register the hook with ``model``, and return whether that was done.

    It is where the model is a DistributedDataParallel without a hook, the optimizer knows its
    ranks, and it trains a matrix with an ordinary gradient.
    """
    table = optimizer._table
    table.follow(optimizer.param_groups)
    useful = any(not (ref.trainable.packed or ref.trainable.hooked) for ref in table.refs)
    free = isinstance(model, DistributedDataParallel) and not model._comm_hooks
    if not (useful and free and optimizer._replicas.group is not None):
        return False
    model.register_comm_hook(optimizer, trained_entries_hook)
    return True


def check_ranks(optimizer: Any) -> None:
    """Raise TypeError or RuntimeError unless this is a LiftAdamW that knows its ranks."""
    if not isinstance(optimizer, LiftAdamW):
        raise TypeError(
            "trained_entries_hook needs the LiftAdamW as its state, register_comm_hook(optimizer, "
            f"trained_entries_hook); got {type(optimizer).__name__}"
        )
    if not optimizer._replicas.known:
        raise RuntimeError(
            "trained_entries_hook averages gradients over the ranks of its LiftAdamW, which has none; give "
            "LiftAdamW(process_group=...) the group of DistributedDataParallel, e.g. torch.distributed.group.WORLD"
        )


def _index_lists(optimizer: LiftAdamW, parameters: list[Tensor]) -> list[Tensor | None]:
    """The trained entries of each parameter, or None where its gradient is averaged whole."""
    table, schedule, by_gradient = optimizer._table, optimizer._schedule, optimizer.selection == "gradient"
    table.follow(optimizer.param_groups)
    if not table.hook_agreed:  # Another rank may have loaded another state, or none.
        agree_on_entries(table.loaded, optimizer._replicas)
        table.hook_agreed = True
    lists: list[Tensor | None] = []
    for p, ref in zip(parameters, map(table.matrix_of, parameters)):
        lists.append(None)
        if ref is None or ref.arena is None or ref.trainable.packed or ref.trainable.hooked:
            continue
        whole = optimizer_hooks.holder_of(p) is not optimizer  # Another one trains other entries.
        # Without all masks, it is not known which matrices a spread schedule takes next.
        whole |= by_gradient and (bool(table.missing) or schedule.may_be_due_next(ref, table.refs))
        if whole:
            table.partial.discard(ref)
        else:
            table.partial.add(ref)
            lists[-1] = ref.arena.indices[ref.arena.segment(ref.row)]
    return lists
