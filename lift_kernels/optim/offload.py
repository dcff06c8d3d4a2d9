"""Optimizer state in host memory: gradients come down, and new values of the entries go up.

The index lists stay beside the weights, because the backward pass and a refresh read them. All
else is in host memory, where the CPU's op makes the step. Nothing but trained entries is copied:
their gradients, and their weights where no fp32 master knows them. So a step costs few bytes in
both directions, and the device holds no moment and no master.

A step goes through the entries in chunks. While the CPU updates one chunk, the gradients of the
next come down on a side stream and the values of the last go up on another. Between CPU tensors the
same code runs without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.state_formats import GROUP, decode, encode_first, encode_root, groups_of
from ..validation import ALIGNMENT
from .packed_state import PackedState

CHUNK = 1 << 21
"""Entries of a chunk at most, a multiple of `ALIGNMENT`."""


class Part(NamedTuple):
    """Some entries of a matrix in a chunk.

    Attributes:
        place: of the matrix among those of the step.
        start, stop: of the entries in its index list. ``start`` is a multiple of `ALIGNMENT`, so
            that 8-bit groups stay whole.
        at: where they start in the chunk's memory.
    """

    place: int
    start: int
    stop: int
    at: int

    @property
    def staged(self) -> slice:
        """Where the entries are in the chunk's memory."""
        return slice(self.at, self.at + self.stop - self.start)


def chunks_of(counts: Sequence[int]) -> list[list[Part]]:
    """All entries of matrices with ``counts`` entries, in chunks."""
    chunks: list[list[Part]] = []
    at = CHUNK
    for place, count in enumerate(counts):
        start = 0
        while start < count:
            if at == CHUNK:
                chunks.append([])
                at = 0
            stop = min(count, start + CHUNK - at)
            chunks[-1].append(Part(place, start, stop, at))
            at += -(-(stop - start) // ALIGNMENT) * ALIGNMENT
            start = stop
    return chunks


class HostState(PackedState):
    """A `PackedState` of which only the index lists are on the device of the weights."""

    def __init__(self, device: torch.device, *form: Any, **more: Any) -> None:
        super().__init__(device, *form, **more)
        for name, arena in self.buffers().items():
            if name != "indices":
                setattr(self, name, arena.cpu())
        self.steps = self.steps.cpu()
        self._lanes = _Lanes(device)

    def _new(self, arena: Tensor, size: int) -> Tensor:
        pinned = arena.device.type == "cpu" and self.indices.device.type == "cuda"
        return torch.zeros(size, dtype=arena.dtype, device=arena.device, pin_memory=pinned)

    def begin_step(self, rows: Sequence[int], found_inf: Tensor | None = None) -> Tensor:
        return super().begin_step(rows)  # `step` reads found_inf.

    def step(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[int],
        counts: Sequence[int],
        steps: Tensor,
        lr: float | Tensor,
        *,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        packed_grads: bool,
        backend: str | None,
        **options: Any,
    ) -> None:
        """What `ops.sparse_adamw_` does, of which the arguments are. Numbers are on the device.

        The host waits for the gradients. What the current stream does later waits for the weights.
        A step that ``found_inf`` skips is taken from ``steps`` again.
        """
        inv_scale, found_inf = _on_host(inv_scale, found_inf)
        if found_inf is not None and found_inf != 0:
            steps -= 1.0
            return
        lr = lr.to("cpu") if isinstance(lr, Tensor) else lr
        lanes, on_device = self._lanes, backend
        if self.indices.device.type != "cpu" and backend != "reference":
            backend = None  # It names that of the device.
        length = torch.zeros((), dtype=torch.int32).expand(self.exp_avg.numel())
        sends_weights = self.master is None or self.master.dtype != torch.float32
        chunks = chunks_of(counts)
        lanes.begin(max((chunk[-1].staged.stop for chunk in chunks), default=0), grads[0].dtype, weights[0].dtype)

        def send(number: int) -> None:
            with lanes.down(number) as (staged_grads, staged_weights):
                for part in chunks[number]:
                    i, entries = part.place, slice(part.start, part.stop)
                    indices = self.indices[offsets[i] + part.start : offsets[i] + part.stop]
                    grad = (
                        grads[i].reshape(-1)[entries]
                        if packed_grads
                        else ops.packed_gather(grads[i], indices, backend=on_device)
                    )
                    staged_grads[part.staged].copy_(grad, non_blocking=True)
                    if sends_weights:
                        values = ops.packed_gather(weights[i].detach(), indices, backend=on_device)
                        staged_weights[part.staged].copy_(values, non_blocking=True)

        for number, chunk in enumerate(chunks):
            if number == 0:
                send(0)
            if number + 1 < len(chunks):
                send(number + 1)
            staged_grads, staged_weights = lanes.wait(number)
            ops.sparse_adamw_(
                [staged_weights[part.staged] for part in chunk],
                [staged_grads[part.staged] for part in chunk],
                length,
                [offsets[part.place] + part.start for part in chunk],
                [part.stop - part.start for part in chunk],
                self.exp_avg,
                self.exp_avg_sq,
                steps[torch.tensor([part.place for part in chunk])],
                lr,
                master=self.master,
                births=self.births,
                exp_avg_scale=self.exp_avg_scale,
                exp_avg_sq_scale=self.exp_avg_sq_scale,
                inv_scale=inv_scale,
                packed_grads=True,
                packed_weights=True,
                backend=backend,
                **options,
            )
            with lanes.up(number):
                values = staged_weights[: chunk[-1].staged.stop].to(self.indices.device, non_blocking=True)
                for part in chunk:
                    i = part.place
                    indices = self.indices[offsets[i] + part.start : offsets[i] + part.stop]
                    ops.packed_scatter_(weights[i], indices, values[part.staged], backend=on_device)
        lanes.end()

    def _move(self, rows: Sequence[int], lists: Sequence[Tensor], old: Sequence[int], backend: str | None) -> Tensor:
        """Only the old place of each new entry is sent, and its weight for an fp32 master."""
        kept = []
        for row, new, count in zip(rows, lists, old):
            offset, weight = self.offsets[row], self.weights[row].detach()
            places = torch.arange(count, dtype=torch.int32, device=new.device)
            was = self.indices[offset : offset + count]
            source = ops.packed_migrate(places, was, new, fill=-1.0, backend=backend)
            kept.append((source >= 0).sum())
            entering: Tensor | float = 0.0
            if self.master is not None and self.master.dtype == torch.float32:
                entering = ops.packed_gather(weight, new, backend=backend).cpu().float()
            self._carry(row, count, source.cpu(), entering)
            self.indices[offset : offset + len(new)] = new
        return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64, device=self.indices.device)

    def _carry(self, row: int, count: int, source: Tensor, entering: Tensor | float) -> None:
        """Move the state of a matrix of ``count`` entries.

        Args:
            source: the old place of each new entry, or -1 of those that enter.
            entering: fp32 masters of these.
        """
        offset, first = self.offsets[row], self.offsets[row] // GROUP
        before, after = slice(offset, offset + count), slice(offset, offset + len(source))
        for moment, scale, encode in (
            (self.exp_avg, self.exp_avg_scale, encode_first),
            (self.exp_avg_sq, self.exp_avg_sq_scale, encode_root),
        ):
            if scale is None:
                moment[after] = _carried(moment[before], source, 0.0)
            else:  # through fp32, because other entries share the groups
                values = decode(moment[before], scale[first : first + groups_of(count)])
                codes, scales = encode(_carried(values, source, 0.0))
                moment[after], scale[first : first + len(scales)] = codes, scales
        if self.births is not None:
            self.births[after] = _carried(self.births[before], source, int(self.steps[row]))
        if self.master is not None:
            self.master[after] = _carried(self.master[before], source, entering)


def _on_host(*numbers: Tensor | None) -> list[Tensor | None]:
    """0-dim numbers of one device, read with one wait."""
    given = [number for number in numbers if number is not None]
    read = iter(torch.stack(given).cpu().unbind() if given else ())
    return [None if number is None else next(read) for number in numbers]


def _carried(values: Tensor, source: Tensor, entering: Tensor | float) -> Tensor:
    """``values[source]``, or ``entering`` where ``source`` is -1."""
    values = values if len(values) else values.new_zeros(1)
    return torch.where(source < 0, entering, values[source.long()]).to(values.dtype)


class _Lanes:
    """Two side streams, and two pieces of pinned memory that the chunks of a step use in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._streams = device, device.type == "cuda"
        self._down, self._up = (torch.cuda.Stream(device) if self._streams else None for _ in range(2))
        self._bytes: list[tuple[Tensor, Tensor]] = []  # for gradients and weights of a chunk
        self._views: list[tuple[Tensor, Tensor]] = []
        self._ready: list[Any] = [None, None]  # events: gradients have come down
        self._free: list[Any] = [None, None]  # events: values have gone up

    def begin(self, size: int, *dtypes: torch.dtype) -> None:
        """Prepare a step whose chunks have ``size`` entries at most."""
        if not self._bytes or len(self._bytes[0][0]) < 4 * size:
            self._bytes = [
                tuple(torch.empty(4 * size, dtype=torch.uint8, pin_memory=self._streams) for _ in dtypes)  # type: ignore[misc]
                for _ in range(2)
            ]
        self._views = [tuple(piece.view(dtype) for piece, dtype in zip(pair, dtypes)) for pair in self._bytes]  # type: ignore[misc]
        if self._down is not None:
            self._down.wait_stream(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def down(self, number: int):
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
    def up(self, number: int):
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
