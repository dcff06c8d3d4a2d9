"""PackedState: index lists, moments, masters and ages of many matrices in one arena."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..nn.weight_version import follow_weight, warn_of_changed, weight_version
from ..ops.state_formats import GROUP, groups_of
from ..validation import ALIGNMENT, check_index_lists, check_matrix, require
from .state_conversion import EIGHT_BIT, SCALES, check_lengths, master_as, moment_dtypes, moments_as


class PackedState:
    """The optimizer state of matrices that share a device, a weight dtype and a form of state.

    Attributes (all arenas have one length; matrix i owns ``offsets[i] .. offsets[i] + counts[i]``):
        indices: int32, sorted flat positions of each matrix.
        exp_avg, exp_avg_sq: moments in ``state_dtype``: fp32, bf16 or "8bit", which are codes.
        exp_avg_scale, exp_avg_sq_scale: fp32 scales of the codes, one for 32 entries, or None.
        master: fp32 values of low-precision weights, or their low halves (int16), or None.
        births: int32 step count at which each entry came in, or None (global bias correction).
        steps: (n,) fp32, updates of each matrix.
        layout: a number that rises when offsets, counts and addresses change.
    """

    def __init__(
        self, device: torch.device, state_dtype: torch.dtype | str, *, master: str | None, births: bool
    ) -> None:
        self.weights: list[Tensor] = []
        self.names: list[str] = []
        self.offsets: list[int] = []
        self.counts: list[int] = []
        self.layout = 0
        self.steps = torch.zeros(0, dtype=torch.float32, device=device)
        self.indices = torch.zeros(0, dtype=torch.int32, device=device)
        self.state_dtype = state_dtype
        first, second = moment_dtypes(state_dtype)
        scales, masters = state_dtype == EIGHT_BIT, {"fp32": torch.float32, "split": torch.int16, None: None}[master]
        self.exp_avg = torch.zeros(0, dtype=first, device=device)
        self.exp_avg_sq = torch.zeros(0, dtype=second, device=device)
        self.exp_avg_scale = torch.zeros(0, dtype=torch.float32, device=device) if scales else None
        self.exp_avg_sq_scale = torch.zeros(0, dtype=torch.float32, device=device) if scales else None
        self.master = torch.zeros(0, dtype=masters, device=device) if masters else None
        self.births = torch.zeros(0, dtype=torch.int32, device=device) if births else None
        # Whether masters must follow weights that change. Low halves need not: beside another
        # weight they belong to a master that rounds to it.
        self._follows = master == "fp32"
        self._dtypes: list[torch.dtype] = []  # of the weights when they came in
        self._every_row: list[int] = []
        self._row_tensors: dict[tuple[int, ...], Tensor] = {}
        # The version of each weight when its master was last right (`weight_version`).
        self._addresses: list[int] = []
        self._counters: list[int] = []

    def _new(self, arena: Tensor, size: int) -> Tensor:
        """A buffer of zeros in place of another."""
        return torch.zeros(size, dtype=arena.dtype, device=arena.device)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that exist, by name. All but scales have the arena's length."""
        names = ("indices", "exp_avg", "exp_avg_sq", *SCALES, "master", "births")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def append(
        self,
        weights: Sequence[Tensor],
        entries: Sequence[dict[str, Tensor]],
        names: Sequence[str],
        *,
        validate: bool = True,
    ) -> None:
        """Add matrices to the arena.

        An entry holds ``indices`` and may hold what `views` shows. The rest starts at zero or at
        the weight's values. The arena grows by copying, so addresses change. Raises before anything
        is changed when an entry does not fit its weight. ``validate=False`` trusts the contents of
        the index lists, which are read otherwise, with one wait for the device.
        """
        for weight, name in zip(weights, names):
            check_matrix(weight, name)
            require(
                weight.device == self.indices.device,
                f"{name}: the weight is on {weight.device}, the state on {self.indices.device}",
            )
        if validate:
            check_index_lists([entry["indices"] for entry in entries], [w.numel() for w in weights], names)
        for entry, name in zip(entries, names):
            check_lengths(entry, self.buffers().keys() - set(SCALES), name)
        steps = [
            torch.as_tensor(entry.get("step", 0.0), dtype=torch.float32, device=self.steps.device) for entry in entries
        ]
        joined = torch.cat([self.steps, *(step.reshape(1) for step in steps)])
        self._lay_out(self.counts + [entry["indices"].numel() for entry in entries])
        first = len(self.weights)
        self.steps = joined
        self.weights += weights
        self.names += names
        self._every_row = list(range(len(self.weights)))
        self._dtypes += [weight.dtype for weight in weights]
        self._addresses += [0] * len(weights)
        self._counters += [-1] * len(weights)
        for i, (weight, entry) in enumerate(zip(weights, entries), start=first):
            self._fill(i, weight, entry)

    def views(self, i: int) -> dict[str, Tensor]:
        """Views of matrix i: ``step`` (0-dim) and its slice of every buffer."""
        segment, groups = self.segment(i), self._groups(i)
        views = {name: arena[groups if name in SCALES else segment] for name, arena in self.buffers().items()}
        return {"step": self.steps[i], **views}

    def segment(self, i: int) -> slice:
        """The arena positions of matrix i."""
        return slice(self.offsets[i], self.offsets[i] + self.counts[i])

    def _groups(self, i: int) -> slice:
        """The places of matrix i in the scales."""
        first = self.offsets[i] // GROUP
        return slice(first, first + groups_of(self.counts[i]))

    def begin_step(self, rows: Sequence[int], found_inf: Tensor | None = None) -> Tensor:
        """Prepare a step of the matrices ``rows``, and return what their step counts will be.

        Masters follow weights that were changed outside the optimizer.

        Args:
            found_inf: a number beside ``steps``. Unless it is zero, the step will be skipped, and
                so is not counted.

        Returns (len(rows),) fp32. Raises, naming the parameter, if a weight changed its dtype,
        device or strides.
        """
        self.regather_masters(rows)
        count = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
        return (self.steps if self._is_all(rows) else self.steps[self._row_tensor(tuple(rows))]) + count

    def end_step(self, rows: Sequence[int], steps: Tensor) -> None:
        """Commit a step: store the new step counts, and record that weights match their masters."""
        if self._is_all(rows):
            self.steps.copy_(steps)
        else:
            self.steps[self._row_tensor(tuple(rows))] = steps
        if self._follows:
            for row, counter in zip(rows, [self.weights[row]._version for row in rows]):
                self._counters[row] = counter

    def migrate(
        self, rows: Sequence[int], lists: Sequence[Tensor], *, validate: bool = True, backend: str | None = None
    ) -> Tensor:
        """Give the matrices ``rows`` new index lists (paper section 3.2).

        Entries that stay keep moments, master and age. Entries that enter start with zero moments
        and the weight's value. Entries that leave keep the weight value they have. Lists of the
        same length keep every address. Masters follow weights that were changed outside first.

        Args:
            lists: sorted int32 positions, one list for each of ``rows``.
            validate: False trusts the contents of the lists, which are read otherwise, with one
                wait for the device.
            backend: one of `lift_kernels.backends`, None for the fastest usable one.

        Returns (len(rows),) int64 on the device, how many entries of each new list were in the old
        one. Raises before anything is changed when a list does not fit its weight.
        """
        numels, names = [self.weights[row].numel() for row in rows], [self.names[row] for row in rows]
        if validate:
            check_index_lists(lists, numels, names, self.indices.device)
        self.regather_masters(rows)
        old, new = [self.counts[row] for row in rows], [indices.numel() for indices in lists]
        if old != new:
            self._resize(rows, [max(pair) for pair in zip(old, new)])
        try:
            kept = self._move(rows, lists, old, backend)
        except Exception:
            if old != new:
                self._resize(rows, old)  # The space for longer lists holds nothing yet.
            raise
        if old != new:
            self._resize(rows, new)
        self._mark(rows)
        return kept

    def _move(self, rows: Sequence[int], lists: Sequence[Tensor], old: Sequence[int], backend: str | None) -> Tensor:
        """`migrate` of matrices that have ``old`` entries, within their segments."""
        return ops.arena_migrate_(
            [self.weights[row].detach() for row in rows],
            lists,
            self.indices,
            [self.offsets[row] for row in rows],
            old,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps if self._is_all(rows) else self.steps[self._row_tensor(tuple(rows))],
            master=self.master,
            births=self.births,
            exp_avg_scale=self.exp_avg_scale,
            exp_avg_sq_scale=self.exp_avg_sq_scale,
            backend=backend,
        )

    def regather_masters(self, rows: Sequence[int]) -> None:
        """Let masters follow weights that were changed outside the optimizer (`weight_version`).

        Raises as `begin_step` does for weights that moved or changed their dtype.
        """
        weights, dtypes, addresses, counters = self._columns(rows)
        # These two lists are `weight_version`, without a call for every matrix of every step. The
        # address alone does not tell: an allocator gives it again to a weight of another dtype.
        same = [w.data_ptr() for w in weights] == addresses and [w.dtype for w in weights] == dtypes
        if same and all([w.is_contiguous() for w in weights]):
            if not self._follows or [w._version for w in weights] == counters:
                return
        self.check_weights(rows)
        changed = []
        for row, weight in zip(rows, weights):
            seen, segment = (self._addresses[row], self._counters[row]), self.segment(row)
            if self._follows:
                assert self.master is not None
                _, stale = follow_weight(seen, self.master[segment], weight, self.indices[segment])
                changed += [self.names[row]] * stale
            self._addresses[row], self._counters[row] = weight_version(weight)
        warn_of_changed(changed, "fp32 masters follow the new values")

    def _columns(self, rows: Sequence[int]) -> Sequence[list[Any]]:
        """Weights, and their dtypes, addresses and version counters when they were last seen."""
        columns: Sequence[list[Any]] = (self.weights, self._dtypes, self._addresses, self._counters)
        return columns if self._is_all(rows) else [[column[row] for row in rows] for column in columns]

    def _is_all(self, rows: Sequence[int]) -> bool:
        return list(rows) == self._every_row

    def _row_tensor(self, rows: tuple[int, ...]) -> Tensor:
        """``rows`` on the device. It is cached: a step uploads nothing and can be captured."""
        if rows not in self._row_tensors:
            self._row_tensors[rows] = torch.tensor(rows, dtype=torch.int64).to(self.steps.device, non_blocking=True)
        return self._row_tensors[rows]

    def _mark(self, rows: Sequence[int]) -> None:
        """Record that the masters of these matrices agree with their weights."""
        for row, weight in zip(rows, [self.weights[row] for row in rows]):
            self._addresses[row], self._counters[row] = weight_version(weight)

    def _resize(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        changed = dict(zip(rows, counts))
        self._lay_out([changed.get(i, count) for i, count in enumerate(self.counts)])

    def _lay_out(self, counts: list[int]) -> None:
        """New buffers in which matrix i has ``counts[i]`` entries, filled up with zeros.

        Rows that are not in the old buffers yet come last. Nothing is changed when memory runs out.
        """
        sizes = [-(-count // ALIGNMENT) * ALIGNMENT for count in counts]
        offsets = [0, *itertools.accumulate(sizes)]
        buffers = {}
        for name, arena in self.buffers().items():
            step = GROUP if name in SCALES else 1
            buffers[name] = grown = self._new(arena, offsets[-1] // step)
            for start, was, count, old_count in zip(offsets, self.offsets, counts, self.counts):
                start, was, size = start // step, was // step, -(-min(count, old_count) // step)
                grown[start : start + size] = arena[was : was + size]
        for name, grown in buffers.items():
            setattr(self, name, grown)
        self.offsets, self.counts, self.layout = offsets[:-1], counts, self.layout + 1

    def _fill(self, i: int, weight: Tensor, entry: dict[str, Tensor]) -> None:
        views = self.views(i)
        if "exp_avg" in entry:
            entry = {**entry, **moments_as(entry, self.state_dtype)}
        for name in self.buffers():
            view = views[name]
            if name in entry:
                view.copy_(master_as(entry[name], view.dtype) if name == "master" else entry[name])
            elif name == "master":
                view.copy_(
                    master_as(ops.packed_gather(weight.detach(), views["indices"], dtype=torch.float32), view.dtype)
                )
            elif name == "births":
                view.fill_(self.steps[i].to(torch.int32))
        if "master" not in entry:  # A given master may be older than the weight. The next step compares them.
            self._mark([i])

    def check_weights(self, rows: Sequence[int]) -> None:
        """Raise, naming the parameter, for a weight that is not what it was when it came in."""
        for row in rows:
            weight, name, was = self.weights[row], self.names[row], (self._dtypes[row], self.indices.device)
            if (weight.dtype, weight.device) != was or not weight.is_contiguous():
                check_matrix(weight, name)
                raise TypeError(
                    f"{name}: the weight became {weight.dtype} on {weight.device} after the optimizer had taken it as "
                    f"{was[0]} on {was[1]}; make the optimizer after converting the model"
                )
