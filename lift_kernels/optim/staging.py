"""The way of entries between device and host: chunks, staging memory, and side streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..validation import ALIGNMENT

CHUNK = 1 << 21
"""Entries of a chunk at most, a multiple of `ALIGNMENT`."""


class Part(NamedTuple):
    """Some entries of a matrix in a chunk.

    Attributes:
        place: of the matrix among those of the step.
        start: the first of the entries in its index list, a multiple of `ALIGNMENT`. So 8-bit
            groups stay whole.
        size: how many there are.
        arena: where they start in the arenas.
        at: where they start in the chunk's memory.
    """

    place: int
    start: int
    size: int
    arena: int
    at: int

    @property
    def entries(self) -> slice:
        """The entries in the index list of the matrix."""
        return slice(self.start, self.start + self.size)

    @property
    def segment(self) -> slice:
        """The entries in the arenas."""
        return slice(self.arena, self.arena + self.size)

    @property
    def staged(self) -> slice:
        """The entries in the chunk's memory."""
        return slice(self.at, self.at + self.size)


def chunks_of(offsets: Sequence[int], counts: Sequence[int]) -> list[list[Part]]:
    """All entries of matrices, in order, in chunks. Arguments as in `ops.sparse_adamw_`."""
    chunks: list[list[Part]] = []
    at = CHUNK
    for place, (offset, count) in enumerate(zip(offsets, counts)):
        start = 0
        while start < count:
            if at == CHUNK:
                chunks.append([])
                at = 0
            size = min(count - start, CHUNK - at)
            chunks[-1].append(Part(place, start, size, offset + start, at))
            at += -(-size // ALIGNMENT) * ALIGNMENT
            start += size
    return chunks


class Lanes:
    """Two side streams, and two pieces of pinned memory that the chunks of a step use in turn.

    Attributes:
        streams: whether the device has streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.streams = device, device.type == "cuda"
        self._down, self._up = (torch.cuda.Stream(device) if self.streams else None for _ in range(2))
        self._bytes: list[tuple[Tensor, Tensor]] = []  # for gradients and weights of a chunk
        self._views: list[tuple[Tensor, Tensor]] = []
        self._ready: list[Any] = [None, None]  # events: gradients have come down
        self._free: list[Any] = [None, None]  # events: values have gone up

    def begin(self, sizes: Sequence[int], *dtypes: torch.dtype) -> None:
        """Prepare a step whose chunks have ``sizes`` entries, of gradients and weights in turn."""
        size = max(sizes, default=0)
        if not self._bytes or len(self._bytes[0][0]) < 4 * size:
            self._bytes = [
                tuple(torch.empty(4 * size, dtype=torch.uint8, pin_memory=self.streams) for _ in dtypes)  # type: ignore[misc]
                for _ in range(2)
            ]
        self._views = [tuple(piece.view(dtype) for piece, dtype in zip(pair, dtypes)) for pair in self._bytes]  # type: ignore[misc]
        if self._down is not None:
            self._down.wait_stream(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def down(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What is sent inside fills the memory of a chunk, which is given, once that is free."""
        turn = number % 2
        with self._on(self._down):
            if self._down is not None and self._free[turn] is not None:
                self._down.wait_event(self._free[turn])
            yield self._views[turn]
            self._ready[turn] = self._mark(self._down)

    def wait(self, number: int) -> tuple[Tensor, Tensor]:
        """Wait until the gradients of a chunk have come down, and return its memory."""
        turn = number % 2
        if self._ready[turn] is not None:
            self._ready[turn].synchronize()
        return self._views[turn]

    @contextlib.contextmanager
    def up(self, number: int) -> Iterator[None]:
        """What is sent inside may read the memory of a chunk until it is used again."""
        with self._on(self._up):
            yield
            self._free[number % 2] = self._mark(self._up)

    def end(self) -> None:
        """Let the current stream wait for what has been sent."""
        if self._up is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._up)

    @staticmethod
    def _on(stream: Any) -> Any:
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    @staticmethod
    def _mark(stream: Any) -> Any:
        return None if stream is None else stream.record_event()
