"""Process groups: their ranks, and the group of a data-parallel run that accelerate has set up."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist


def ranks_of(group: Any) -> tuple[int, ...]:
    """Global ranks of a group that this rank belongs to, sorted.

    Raises TypeError for what is no group and ValueError for a group without this rank.
    """
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group does not contain this rank; give the group that this rank belongs to")
        raise TypeError(f"process_group must be a torch process group, None or 'independent', got {group!r}")
    return tuple(sorted(dist.get_process_group_ranks(group)))


def is_alive(group: dist.ProcessGroup | None) -> bool:
    """Whether a group exists: destroy_process_group ends it."""
    try:
        return group is not None and bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False


def same_ranks(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The default group if it has these ranks, for an optimizer that has lost its group."""
    world = dist.group.WORLD
    return world if world is not None and ranks_of(world) == ranks else None


def data_parallel_group() -> dist.ProcessGroup | None:
    """The default group if accelerate, or transformers' Trainer, replicates models over it.

    accelerate's distributed types ``MULTI_*`` stand for DistributedDataParallel.
    """
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    shared = {} if state is None else state._shared_state  # A constructor would set up a state where there is none.
    kind = getattr(shared.get("distributed_type"), "value", "")
    return dist.group.WORLD if kind.startswith("MULTI_") else None
