"""Means of tensors over the ranks of a process group, in one collective for each device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def average(
    tensors: Sequence[Tensor | None], sizes: Sequence[int], devices: Sequence[torch.device], group: dist.ProcessGroup
) -> list[Tensor | None]:
    """The mean of each vector over the ranks. A rank without it counts as one with zeros.

    Every rank must call this with the same sizes. A rank that has all vectors does not wait for
    the device.

    Args:
        tensors: vectors of float32, or None where this rank has none.
        sizes: the length of each.
        devices: the device of each.

    Returns:
        The means, new tensors. None where no rank has the vector.
    """
    means: list[Tensor | None] = list(tensors)
    for device in dict.fromkeys(devices):
        places = [i for i, of_one in enumerate(devices) if of_one == device]
        present = torch.ones(len(places), device=device)
        parts = []
        for number, i in enumerate(places):
            part = tensors[i]
            if part is None:
                present[number] = 0
                part = torch.zeros(sizes[i], device=device)
            parts.append(part)
        # DistributedDataParallel divides before the sum, too.
        flat = torch.cat([*parts, present]).div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        *parts, present = flat.split([*map(len, parts), len(places)])
        missing = any(tensors[i] is None for i in places)
        somewhere = present.tolist() if missing else [1.0] * len(places)
        for i, part, share in zip(places, parts, somewhere):
            means[i] = part if share else None
    return means
