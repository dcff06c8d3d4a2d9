"""Digests of index lists and of weights, short enough to be exchanged among ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Entries that are mixed at a time: 32 MiB of scratch instead of eight times a large list's
size.
"""
_CPU_PART = 1 << 15
"""Entries of a weight that are mixed at a time on a CPU. They stay in its caches, and torch uses no
further threads, which would wait for each other.
"""
_BITS = {2: torch.int16, 4: torch.int32}
_FACTORS = (-7046029254386353131, -2960836687051489345, -4417276706812531889)  # odd, so that no bit of an entry is lost


def index_digests(lists: Mapping[str, Sequence[Tensor]]) -> dict[str, str]:
    """A digest of the index lists of each name.

    Equal sets of entries give equal digests on every device. Different sets share a digest with a
    probability of about 2^-64. There is one wait for each device.
    """
    flat = [(name, place, indices) for name, several in lists.items() for place, indices in enumerate(several)]
    sums: dict[torch.device, list[Tensor]] = {}
    for _, _, indices in flat:
        sums.setdefault(indices.device, []).append(_mixed_sum(indices))
    taken = {device: iter(torch.stack(values).tolist()) for device, values in sums.items()}
    digests: dict[str, str] = {}
    for name, _, indices in flat:
        digests[name] = digests.get(name, "") + f"{indices.numel():x}.{next(taken[indices.device]) & (2**64 - 1):016x};"
    return digests


def weight_digests(weights: Sequence[Tensor]) -> list[str]:
    """A digest of the bits of each weight. Equal weights have equal digests on devices of one type.

    There is one wait for each device.
    """
    sums = [_weighted_sum(weight) for weight in weights]
    numbers: dict[torch.device, Iterator[int]] = {}
    for device in {total.device for total in sums}:
        of_device = [total for total in sums if total.device == device]
        numbers[device] = iter(torch.stack(of_device).tolist())
    return [f"{next(numbers[total.device]) & (2**64 - 1):016x}" for total in sums]


def _weighted_sum(weight: Tensor) -> Tensor:
    """The sum of all entries' bits modulo 2^64, each times an odd number of its own: 0-dim int64.

    One pass over the weight costs a fraction of a product with it.
    """
    bits = weight.detach().contiguous().view(_BITS[weight.dtype.itemsize]).view(-1)
    size = min(max(1, len(bits)), _CPU_PART if bits.is_cpu else _CHUNK)
    odd = torch.arange(size, device=bits.device).mul_(_FACTORS[0]).bitwise_or_(1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(size):
        total = total.mul_(_FACTORS[1]).add_((part * odd[: len(part)]).sum())
    return total


def _mixed_sum(indices: Tensor) -> Tensor:
    """The sum of all entries modulo 2^64, each with its bits mixed: 0-dim int64. The order of a sum
    does not matter.
    """
    total = torch.zeros((), dtype=torch.int64, device=indices.device)
    for part in indices.split(_CHUNK):
        mixed = part.long()
        for factor in _FACTORS:
            mixed = mixed.add(1).mul_(factor)
            mixed ^= mixed >> 32
        total += mixed.sum()
    return total
