"""Launch tables on the device: addresses of a launch's tensors, and which piece of which matrix a program works on.

Both are built on the host and cached, so that a step with the same tensors copies nothing. They are never built inside
a CUDA-graph capture, where the copy would be recorded with a host buffer that is soon gone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch

ALIGNMENT = 64
"""Entries to which segments must be aligned and padded for wide loads; at least 128 bytes in every dtype."""


class Table(NamedTuple):
    """A device table, and whether what it describes may be read and written 128 bits at a time."""

    data: Tensor
    aligned: bool


def block_size() -> int:
    """Entries a program handles. The interpreter pays milliseconds a program, whatever its size."""
    return 4096 if dispatch.interpreting() else 1024


def block_table(
    offsets: Sequence[int], counts: Sequence[int], arena_length: int, block: int, device: torch.device
) -> Table:
    """(programs, 4) int64: matrix, arena position, position in the matrix's list, entries left in it (at least 1).

    Aligned: every segment starts at a multiple of `ALIGNMENT` and reaches no other one when padded to it.
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
    """(n,) int64 addresses of the tensors. Aligned: each is a multiple of 16 bytes."""
    addresses = tuple(tensor.data_ptr() for tensor in tensors)

    def build() -> Table:
        return Table(torch.tensor(addresses, dtype=torch.int64, device="cpu"), all(a % 16 == 0 for a in addresses))

    return _pointers.get(addresses, device, build)


def _padded(offset: Tensor, count: Tensor, arena_length: int) -> bool:
    """Whether segments are aligned and can be padded to `ALIGNMENT` entries without reaching each other or the end."""
    start, order = offset[count > 0].sort()
    end = start + (count[count > 0][order] + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    limit = torch.cat([start[1:], torch.tensor([arena_length], device="cpu")])
    return bool((start % ALIGNMENT == 0).all() and (end <= limit[: len(end)]).all())


@dataclass
class _Entry:
    table: Table
    stream: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None
    captured: bool = False


class _Cache:
    """A small LRU of tables. Those in a captured CUDA graph stay for good: it reads them at every replay."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Table]) -> Table:
        """The table under ``key`` on ``device``, which must be the current one; built when it is not there."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = self._entries.get((key, device))
            if entry is None:
                if capturing:
                    raise RuntimeError(
                        f"the {self._name} of a launch changed inside a CUDA graph capture, where their table cannot "
                        "be built: run the step once before the capture with the same tensors, and keep gradients in "
                        "place with zero_grad(set_to_none=False)"
                    )
                entry = self._entries[key, device] = self._upload(build(), device)
                self._evict()
            self._entries.move_to_end((key, device))
            entry.captured |= capturing
        if entry.ready is not None and not capturing and entry.stream != torch.cuda.current_stream():
            torch.cuda.current_stream().wait_event(entry.ready)
            entry.table.data.record_stream(torch.cuda.current_stream())
        return entry.table

    @staticmethod
    def _upload(table: Table, device: torch.device) -> _Entry:
        if device.type != "cuda":
            return _Entry(table)
        # From pinned memory the copy waits for nothing; the allocator keeps the host buffer until it is done.
        uploaded = Table(table.data.pin_memory().to(device, non_blocking=True), table.aligned)
        stream = torch.cuda.current_stream()
        return _Entry(uploaded, stream, stream.record_event())

    def _evict(self) -> None:
        idle = [key for key, entry in self._entries.items() if not entry.captured]
        for key in idle[: max(len(idle) - self._size, 0)]:
            del self._entries[key]


_pointers = _Cache("addresses of weights or gradients", 128)
_blocks = _Cache("segments", 64)
