"""Tables on the device for a launch: tensor addresses, and the work of each program.

Both are built on the host and cached, so that a step with the same tensors copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...validation import ALIGNMENT
from .. import dispatch
from ..device_tables import DeviceTables, Table


def block_size() -> int:
    """Return the entries that a program handles.

    The interpreter takes milliseconds per program, whatever its size, so it gets larger blocks.
    """
    return 4096 if dispatch.interpreting() else 1024


def block_table(
    offsets: Sequence[int], counts: Sequence[int], arena_length: int, block: int, device: torch.device
) -> Table:
    """Return the work of each program, (programs, 4) int64.

    The columns are the matrix, the arena position, the position in the list of the matrix, and the
    entries left in that list (at least 1). The table is marked aligned when every segment starts at
    a multiple of `ALIGNMENT` and reaches no other segment when padded to it.
    """
    offsets, counts = tuple(offsets), tuple(counts)

    def build() -> Table:
        offset, count = torch.tensor([offsets, counts], dtype=torch.int64, device="cpu")
        programs = (count + block - 1) // block
        matrix = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), programs)
        place = (torch.arange(matrix.numel(), device="cpu") - (programs.cumsum(0) - programs)[matrix]) * block
        rows = torch.stack([matrix, offset[matrix] + place, place, count[matrix] - place], dim=1)
        return Table(rows, _padded(offset, count, arena_length))

    return _blocks.get((offsets, counts, arena_length, block), device, build)


def pointer_table(tensors: Sequence[Tensor], device: torch.device) -> Table:
    """Return the addresses of the tensors, (n,) int64.

    The table is marked aligned when each address is a multiple of 16 bytes.
    """
    addresses = tuple(tensor.data_ptr() for tensor in tensors)

    def build() -> Table:
        return Table(torch.tensor(addresses, dtype=torch.int64, device="cpu"), all(a % 16 == 0 for a in addresses))

    return _pointers.get(addresses, device, build)


def migration_table(
    weights: Sequence[Tensor], lists: Sequence[Tensor], counts: Sequence[int], device: torch.device
) -> Table:
    """Return what each matrix of a migration is, (n, 4) int64.

    The columns are the addresses of the weight and of the new list, the length of the old list, and
    the largest power of two up to it (0 for none). The table is marked aligned when each new list
    starts at a multiple of 16 bytes. One upload holds all, because every refresh has new lists.
    """
    rows = tuple(
        (weight.data_ptr(), new.data_ptr(), count, 1 << (count.bit_length() - 1) if count > 0 else 0)
        for weight, new, count in zip(weights, lists, counts)
    )

    def build() -> Table:
        return Table(torch.tensor(rows, dtype=torch.int64, device="cpu"), all(row[1] % 16 == 0 for row in rows))

    return _migrations.get(rows, device, build)


def _padded(offset: Tensor, count: Tensor, arena_length: int) -> bool:
    """Return whether segments are aligned and can be padded to `ALIGNMENT` entries.

    Padded segments must not reach each other or the end of the arena.
    """
    start, order = offset[count > 0].sort()
    end = start + (count[count > 0][order] + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    limit = torch.cat([start[1:], torch.tensor([arena_length], device="cpu")])
    return bool((start % ALIGNMENT == 0).all() and (end <= limit[: len(end)]).all())


_pointers = DeviceTables(
    "addresses of weights or gradients",
    128,
    "run the step once before the capture with the same tensors, and keep gradients in place with "
    "zero_grad(set_to_none=False)",
)
_migrations = DeviceTables("lists of a migration", 8, "refresh between the replays")
_blocks = DeviceTables("segments", 64, "run the step once before the capture with the same matrices")
