"""Calls of `bitmap_to_indices`, and their results by a stable sort of all keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LAST = 2**31 - 1
INF, NAN = 0x7F800000, 0x7FC00000


@dataclass(frozen=True)
class Selection:
    """Arguments and results of a call."""

    bitmaps: Tensor
    candidates: Tensor
    counts: Tensor
    columns: int
    k: int
    indices: Tensor
    thresholds: Tensor  # int32 patterns
    status: Tensor

    def arguments(self, device: str = "cpu") -> tuple:
        return self.bitmaps.to(device), self.candidates.to(device), self.counts.to(device), self.columns, self.k


def packed_bits(flags: Tensor) -> Tensor:
    """Pack (..., n) booleans into (..., ceil(n / 32)) int32, the first one in the lowest bit."""
    width = -(-flags.shape[-1] // 32)
    padded = torch.zeros(*flags.shape[:-1], 32 * width, dtype=torch.int64)
    padded[..., : flags.shape[-1]] = flags
    words = (padded.unflatten(-1, (width, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words > LAST, words - 2**32, words).int()


def selection(keys: Tensor, k: int, low: int, high: int, *, spare: int = 3, capacity: int | None = None) -> Selection:
    """The call that a scan with the bracket [low, high] makes of int32 ``keys`` (b, m, n).

    The candidates are shuffled. ``spare`` places after them hold the largest possible candidates,
    which the op must not read. With a ``capacity``, candidates beyond it are lost.
    """
    batch, m, n = keys.shape
    generator = torch.Generator().manual_seed(m * n + k)
    flat = keys.reshape(batch, m * n)
    definite, near = flat > high, (flat >= low) & (flat <= high)
    counts = torch.stack([definite.sum(1), near.sum(1)], 1).int()
    capacity = int(counts[:, 1].max()) + spare if batch and capacity is None else capacity or spare
    candidates = torch.full((batch, capacity), (LAST << 32) + LAST)
    order = flat.sort(descending=True, stable=True, dim=1).indices[:, :k]
    indices, status = order.sort(1).values.int(), torch.zeros(batch, dtype=torch.int32)
    thresholds = flat.gather(1, order[:, -1:]).flatten()
    for i in range(batch):
        place = near[i].nonzero().flatten()
        noted = ((flat[i, place].long() << 32) + (LAST - place))[torch.randperm(len(place), generator=generator)][
            :capacity
        ]
        candidates[i, : len(noted)] = noted
        if counts[i, 0] >= k or counts[i].sum() < k or len(place) > capacity:
            indices[i], thresholds[i], status[i] = -1, NAN, 1
    return Selection(packed_bits(definite.view(batch, m, n)), candidates, counts, n, k, indices, thresholds, status)


def random_keys(batch: int, m: int, n: int, top: int = INF) -> Tensor:
    return torch.randint(0, top, (batch, m, n), generator=torch.Generator().manual_seed(m + n), dtype=torch.int32)


def with_nan() -> Tensor:
    """Keys with some infinities and NaN of two bit patterns."""
    keys = random_keys(2, 9, 37)
    keys.view(-1)[::7] = INF
    keys.view(-1)[::10] = NAN
    keys.view(-1)[::50] = LAST
    return keys


def spoiled(call: Selection, **changes) -> Selection:
    """A call whose counts, bits and candidates disagree, which is refused as a whole."""
    return replace(
        call,
        **changes,
        indices=torch.full_like(call.indices, -1),
        thresholds=torch.full_like(call.thresholds, NAN),
        status=torch.ones_like(call.status),
    )


def twice_named() -> Selection:
    call = selection(random_keys(2, 6, 40), 100, 2**29, LAST)
    candidates = call.candidates.clone()
    candidates.copy_(candidates[:, 0:1])
    return spoiled(call, candidates=candidates)


def out_of_range() -> Selection:
    call = selection(random_keys(1, 6, 40), 100, 2**29, LAST)
    return spoiled(call, candidates=call.candidates - 6 * 40)


def already_set() -> Selection:
    call = selection(random_keys(2, 6, 40), 100, 2**29, 2**30)
    return spoiled(call, bitmaps=call.bitmaps | -1)


def bits_missing() -> Selection:
    call = selection(random_keys(2, 6, 40), 150, 2**29, 2**30)
    return spoiled(call, bitmaps=torch.zeros_like(call.bitmaps))


def bits_behind_the_last_column() -> Selection:
    call = selection(random_keys(2, 6, 40), 150, 2**29, 2**30)
    bitmaps = call.bitmaps.clone()
    bitmaps[:, :, -1] |= -256
    return replace(call, bitmaps=bitmaps)


CASES = {
    "no matrix": lambda: selection(random_keys(0, 3, 40), 5, 0, LAST),
    "one entry": lambda: selection(random_keys(1, 1, 1), 1, 0, LAST),
    "the largest": lambda: selection(random_keys(3, 7, 5), 1, 2**30, LAST),
    "all": lambda: selection(random_keys(2, 7, 35), 7 * 35, 0, LAST),
    "all, some surely": lambda: selection(random_keys(2, 5, 64), 5 * 64, 0, 2**30),
    "all candidates": lambda: selection(random_keys(2, 8, 33), 100, 0, LAST),
    "a thin bracket": lambda: selection(random_keys(3, 31, 65), 1008, 2**30 - 2**25, 2**30 + 2**25),
    "words in fours": lambda: selection(random_keys(3, 12, 256), 1535, 2**30 - 2**27, 2**30 + 2**27),
    "two tiles": lambda: selection(random_keys(2, 40, 300), 601, 2**30 + 2**29, INF - 2**26),
    "two dense tiles": lambda: selection(random_keys(2, 40, 300), 9001, 2**28, 2**30),
    "one column": lambda: selection(random_keys(2, 700, 1), 233, 2**29, 2**30 + 2**29),
    "one row": lambda: selection(random_keys(2, 1, 1000), 333, 2**30, INF - 2**28),
    "few keys": lambda: selection(random_keys(3, 11, 50, top=4), 300, 1, 2),
    "two keys": lambda: selection(random_keys(3, 11, 50, top=2), 400, 0, 0),
    "one key": lambda: selection(torch.full((2, 9, 33), 7, dtype=torch.int32), 100, 0, LAST),
    "zeros": lambda: selection(torch.zeros(2, 9, 33, dtype=torch.int32), 296, 0, 0),
    "NaN first": lambda: selection(with_nan(), 20, INF, LAST),
    "NaN surely": lambda: selection(with_nan(), 300, 2**27, INF),
    "too many bits": lambda: selection(random_keys(2, 9, 40), 20, 0, 2**30),
    "as many bits as k": lambda: selection(torch.arange(300, dtype=torch.int32).view(1, 10, 30), 20, 200, 279),
    "too few candidates": lambda: selection(random_keys(2, 9, 40), 300, 2**30, LAST),
    "more than the capacity": lambda: selection(random_keys(2, 9, 40), 200, 0, LAST, capacity=359),
    "just the capacity": lambda: selection(random_keys(2, 9, 40), 200, 0, LAST, capacity=360),
    "one of two missed": lambda: selection(torch.arange(600, dtype=torch.int32).view(2, 10, 30), 20, 250, 300),
    "twice named": twice_named,
    "out of range": out_of_range,
    "already set": already_set,
    "bits missing": bits_missing,
    "bits behind the last column": bits_behind_the_last_column,
}
