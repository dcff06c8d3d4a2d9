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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import dispatch
from ..ops.state_formats import GROUP, decode, encode_first, encode_root, groups_of
from ..validation import require
from .packed_state import PackedState
from .staging import Lanes, Part, chunks_of


class HostState(PackedState):
    """A `PackedState` of which only the index lists are on the device of the weights."""

    def __init__(self, device: torch.device, *form: Any, **more: Any) -> None:
        super().__init__(device, *form, **more)
        for name, arena in self.buffers().items():
            if name != "indices":
                setattr(self, name, arena.cpu())
        self.steps = self.steps.cpu()
        self._lanes = Lanes(device)

    def _new(self, arena: Tensor, size: int) -> Tensor:
        pinned = arena.device.type == "cpu" and self.indices.device.type == "cuda"
        return torch.zeros(size, dtype=arena.dtype, device=arena.device, pin_memory=pinned)

    def begin_step(self, rows: Sequence[int], found_inf: Tensor | None = None) -> Tensor:
        require(
            not dispatch.capturing(),
            "a CUDA graph cannot capture a step that the CPU makes; leave out offload='cpu' or the graph",
            RuntimeError,
        )
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
        chunks = chunks_of(offsets, counts)
        if found_inf is not None and found_inf != 0:
            steps -= 1.0
            chunks = []
        options |= dict(lr=lr.to("cpu") if isinstance(lr, Tensor) else lr, inv_scale=inv_scale)
        lanes = self._lanes
        lanes.begin([chunk[-1].staged.stop for chunk in chunks], grads[0].dtype, weights[0].dtype)

        def send(number: int) -> None:
            if number < len(chunks):
                with lanes.down(number) as staged:
                    self._send(chunks[number], weights, grads, packed_grads, staged, backend)

        send(0)
        for number, chunk in enumerate(chunks):
            send(number + 1)  # It comes down while the CPU updates this chunk.
            staged = lanes.wait(number)
            self._update(chunk, staged, steps, backend, options)
            with lanes.up(number):
                self._return(chunk, weights, staged[1], backend)
        lanes.end()

    def _send(
        self,
        chunk: Sequence[Part],
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        packed_grads: bool,
        staged: tuple[Tensor, Tensor],
        backend: str | None,
    ) -> None:
        """Send the gradients of a chunk, and its weights where no master has them."""
        without_master = self.master is None or self.master.dtype != torch.float32
        for part in chunk:
            grad, weight, indices = grads[part.place], weights[part.place].detach(), self.indices[part.segment]
            if packed_grads:
                grad = grad.reshape(-1)[part.entries]
            else:
                grad = ops.packed_gather(grad, indices, backend=backend)
            staged[0][part.staged].copy_(grad, non_blocking=self._lanes.streams)
            if without_master:
                values = ops.packed_gather(weight, indices, backend=backend)
                staged[1][part.staged].copy_(values, non_blocking=self._lanes.streams)

    def _update(
        self,
        chunk: Sequence[Part],
        staged: tuple[Tensor, Tensor],
        steps: Tensor,
        backend: str | None,
        options: dict[str, Any],
    ) -> None:
        """The step of a chunk on the CPU."""
        on_host = backend == "reference" or self.indices.device.type == "cpu"
        ops.sparse_adamw_(
            [staged[1][part.staged] for part in chunk],
            [staged[0][part.staged] for part in chunk],
            torch.zeros((), dtype=torch.int32).expand(self.exp_avg.shape),
            [part.arena for part in chunk],
            [part.size for part in chunk],
            self.exp_avg,
            self.exp_avg_sq,
            steps[torch.tensor([part.place for part in chunk])],
            master=self.master,
            births=self.births,
            exp_avg_scale=self.exp_avg_scale,
            exp_avg_sq_scale=self.exp_avg_sq_scale,
            packed_grads=True,
            packed_weights=True,
            backend=backend if on_host else None,
            **options,
        )

    def _return(self, chunk: Sequence[Part], weights: Sequence[Tensor], staged: Tensor, backend: str | None) -> None:
        """Write the new entries of a chunk into the weights."""
        values = staged[: chunk[-1].staged.stop].to(self.indices.device, non_blocking=self._lanes.streams)
        for part in chunk:
            ops.packed_scatter_(weights[part.place], self.indices[part.segment], values[part.staged], backend=backend)

    def _move(self, rows: Sequence[int], lists: Sequence[Tensor], old: Sequence[int], backend: str | None) -> Tensor:
        """Only the old place of each new entry is sent, and its weight for an fp32 master.

        All is sent before anything is changed. The device holds what belongs to one matrix.
        """
        kept, sent = torch.zeros(len(rows), dtype=torch.int64, device=self.indices.device), []
        for i, (row, new, count) in enumerate(zip(rows, lists, old)):
            places = torch.arange(count, dtype=torch.int32, device=new.device)
            was = self.indices[self.offsets[row] : self.offsets[row] + count]
            source = ops.packed_migrate(places, was, new, fill=-1.0, backend=backend)
            kept[i] = (source >= 0).sum()
            entering: Tensor | float = 0.0
            if self.master is not None and self.master.dtype == torch.float32:
                entering = ops.packed_gather(self.weights[row].detach(), new, backend=backend).cpu()
            sent.append((source.cpu(), entering))
        for row, new, count, (source, entering) in zip(rows, lists, old, sent):
            self._carry(row, count, source.long(), entering)
            self.indices[self.offsets[row] : self.offsets[row] + len(new)] = new
        return kept

    def _carry(self, row: int, count: int, source: Tensor, entering: Tensor | float) -> None:
        """Move the state of a matrix of ``count`` entries.

        Args:
            source: the old place of each new entry, or -1 of those that enter.
            entering: what weights have there, which becomes the fp32 master.
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
    return torch.where(source < 0, entering, values[source])
