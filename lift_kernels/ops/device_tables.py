"""Small tables that kernels read, built on the host and cached on their device.

No table is built inside a CUDA-graph capture. The copy would be recorded with a host buffer that is
soon freed. The table would lie in memory of the graph, and would stay empty if the capture fails.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """A device table, and whether what it describes allows 128-bit accesses."""

    data: Tensor
    aligned: bool


@dataclass
class _Entry:
    table: Table
    stream: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None
    captured: bool = False


class DeviceTables:
    """A small LRU cache of tables.

    A table that a captured CUDA graph reads stays for good, because every replay reads it again.

    Args:
        name: what the tables hold, for the error message.
        size: number of tables that are kept.
        remedy: what to do when a table is missing inside a capture, for the error message.
    """

    def __init__(self, name: str, size: int, remedy: str) -> None:
        self._name, self._size, self._remedy = name, size, remedy
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Table]) -> Table:
        """Return the table under ``key`` on ``device``, and build it if it is not there.

        Raises:
            RuntimeError: it would have to be built inside a CUDA-graph capture.
        """
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return self._get(key, device, build)

    def _get(self, key: Hashable, device: torch.device, build: Callable[[], Table]) -> Table:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = self._entries.get((key, device))
            if entry is None:
                if capturing:
                    raise RuntimeError(
                        f"the {self._name} of a launch changed inside a CUDA graph capture, where no table can "
                        f"be built: {self._remedy}"
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
        # From pinned memory the copy waits for nothing. The allocator keeps the host buffer until
        # the copy is done.
        uploaded = Table(table.data.pin_memory().to(device, non_blocking=True), table.aligned)
        stream = torch.cuda.current_stream()
        return _Entry(uploaded, stream, stream.record_event())

    def _evict(self) -> None:
        idle = [key for key, entry in self._entries.items() if not entry.captured]
        for key in idle[: max(len(idle) - self._size, 0)]:
            del self._entries[key]
