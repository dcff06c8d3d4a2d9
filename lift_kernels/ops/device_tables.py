"""Small tables that kernels read, built on the host and kept on their device.

None is built inside a CUDA-graph capture: the copy would be recorded with a host buffer that is
soon gone, and the table would lie in memory of the graph, never filled where the capture fails.
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
    """A device table, and whether what it describes may be read and written 128 bits at a time."""

    data: Tensor
    aligned: bool


@dataclass
class _Entry:
    table: Table
    stream: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None
    captured: bool = False


class DeviceTables:
    """A small LRU of tables. Those in a captured CUDA graph stay for good: it reads them at every
    replay.

    ``name`` and ``remedy`` go into the message of a table that is missing inside a capture.
    """

    def __init__(self, name: str, size: int, remedy: str) -> None:
        self._name, self._size, self._remedy = name, size, remedy
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Table]) -> Table:
        """The table under ``key`` on ``device``; built when it is not there.

        Raises RuntimeError where it would have to be built inside a capture.
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
                        f"the {self._name} of a launch changed inside a CUDA graph capture, where their table cannot "
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
        # From pinned memory the copy waits for nothing; the allocator keeps the host buffer until
        # it is done.
        uploaded = Table(table.data.pin_memory().to(device, non_blocking=True), table.aligned)
        stream = torch.cuda.current_stream()
        return _Entry(uploaded, stream, stream.record_event())

    def _evict(self) -> None:
        idle = [key for key, entry in self._entries.items() if not entry.captured]
        for key in idle[: max(len(idle) - self._size, 0)]:
            del self._entries[key]
