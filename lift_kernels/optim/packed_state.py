"""PackedState: index lists, moments, masters and ages of many matrices in one arena."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..nn.weight_version import WeightVersion, update_stale
from ..validation import ALIGNMENT, check_index_list, check_matrix, require

logger = logging.getLogger("lift_kernels")


class PackedState:
    """The optimizer state of matrices that share a device, a weight dtype and a form of state.

    Attributes (all arenas have one length; matrix i owns ``offsets[i] .. offsets[i] + counts[i]``):
        indices: int32, sorted flat positions of each matrix.
        exp_avg, exp_avg_sq: moments in ``state_dtype`` (fp32 or bf16).
        master: fp32 values of low-precision weights, or None.
        births: int32 step count at which each entry came in, or None (global bias correction).
        steps: (n,) fp32, updates of each matrix.
    """

    def __init__(self, device: torch.device, state_dtype: torch.dtype, *, master: bool, births: bool) -> None:
        self.weights: list[Tensor] = []
        self.names: list[str] = []
        self.offsets: list[int] = []
        self.counts: list[int] = []
        self.steps = torch.zeros(0, dtype=torch.float32, device=device)
        self.indices = torch.zeros(0, dtype=torch.int32, device=device)
        self.exp_avg = torch.zeros(0, dtype=state_dtype, device=device)
        self.exp_avg_sq = torch.zeros(0, dtype=state_dtype, device=device)
        self.master = torch.zeros(0, dtype=torch.float32, device=device) if master else None
        self.births = torch.zeros(0, dtype=torch.int32, device=device) if births else None
        self._dtypes: list[torch.dtype] = []  # of the weights when they came in
        self._row_tensors: dict[tuple[int, ...], Tensor] = {}
        self._seen: list[WeightVersion] = []  # of each weight when its master was last right

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that exist, by name. All have the arena's length."""
        names = ("indices", "exp_avg", "exp_avg_sq", "master", "births")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def append(self, weights: Sequence[Tensor], entries: Sequence[dict[str, Tensor]], names: Sequence[str]) -> None:
        """Add matrices to the arena.

        An entry holds ``indices`` and may hold what `views` shows. The rest starts at zero or at
        the weight's values. The arena grows by copying, so addresses change. Raises before anything
        is changed when an entry does not fit its weight.
        """
        for weight, entry, name in zip(weights, entries, names):
            self._check_entry(weight, entry, name)
        first = len(self.weights)
        size = self.indices.numel()
        for weight, entry, name in zip(weights, entries, names):
            self.weights.append(weight)
            self._dtypes.append(weight.dtype)
            self.names.append(name)
            self.offsets.append(size)
            self.counts.append(entry["indices"].numel())
            size += -(-self.counts[-1] // ALIGNMENT) * ALIGNMENT
        self._seen += [WeightVersion(0, 0)] * len(weights)
        for name, arena in self.buffers().items():
            grown = torch.zeros(size, dtype=arena.dtype, device=arena.device)
            grown[: arena.numel()] = arena
            setattr(self, name, grown)
        steps = [
            torch.as_tensor(entry.get("step", 0.0), dtype=torch.float32, device=self.steps.device) for entry in entries
        ]
        self.steps = torch.cat([self.steps, *(step.reshape(1) for step in steps)])
        for i, (weight, entry) in enumerate(zip(weights, entries), start=first):
            self._fill(i, weight, entry)

    def views(self, i: int) -> dict[str, Tensor]:
        """Views of matrix i: ``step`` (0-dim) and its slice of every buffer."""
        segment = self.segment(i)
        return {"step": self.steps[i], **{name: arena[segment] for name, arena in self.buffers().items()}}

    def segment(self, i: int) -> slice:
        """The arena positions of matrix i."""
        return slice(self.offsets[i], self.offsets[i] + self.counts[i])

    def next_steps(self, rows: Sequence[int], found_inf: Tensor | None = None) -> Tensor:
        """(len(rows),) fp32 step counts that include the coming update.

        A non-zero ``found_inf`` will skip the update, so it is not counted then.
        """
        count = 1.0 if found_inf is None else (found_inf == 0).to(torch.float32)
        return self._of(rows) + count

    def end_step(self, rows: Sequence[int], steps: Tensor) -> None:
        """Commit a step: store the new step counts, and record that weights match their masters."""
        if self._is_all(rows):
            self.steps.copy_(steps)
        else:
            self.steps[self._row_tensor(tuple(rows))] = steps
        if self.master is not None:
            for row in rows:
                self._mark(row)

    def check_weights(self, rows: Sequence[int]) -> None:
        """Raise, naming the parameter, if a weight changed its dtype, device or strides."""
        for row in rows:
            weight, name, dtype = self.weights[row], self.names[row], self._dtypes[row]
            if weight.dtype != dtype or weight.device != self.indices.device or not weight.is_contiguous():
                check_matrix(weight, name)
                raise TypeError(
                    f"{name}: the weight became {weight.dtype} on {weight.device} after the optimizer had taken it as "
                    f"{dtype} on {self.indices.device}; make the optimizer after converting the model"
                )

    def count_kept(self, row: int, new: Tensor, backend: str | None = None) -> Tensor:
        """How many entries of matrix ``row`` are also in the sorted list ``new``.

        A 0-dim tensor on the device.
        """
        old = self.indices[self.segment(row)]
        return (ops.packed_migrate(old, old, new, fill=-1, backend=backend) >= 0).sum()

    def migrate(self, rows: Sequence[int], lists: Sequence[Tensor], *, backend: str | None = None) -> None:
        """Give the matrices ``rows`` new index lists (paper section 3.2).

        Entries that stay keep moments, master and age. Entries that enter start with zero moments
        and the weight's value. Entries that leave keep the weight value they have. Lists of the
        same length keep every address. Raises before anything is changed when a list does not fit
        its weight.
        """
        for row, new in zip(rows, lists):
            check_index_list(new, self.weights[row].numel(), self.names[row], self.indices.device)
        if any(new.numel() != self.counts[row] for row, new in zip(rows, lists)):
            return self._migrate_resized(dict(zip(rows, lists)), backend)
        for row, new in zip(rows, lists):
            for name, values in self._migrated(row, new, backend).items():
                getattr(self, name)[self.segment(row)] = values
            self._mark(row)

    def regather_masters(self, rows: Sequence[int]) -> None:
        """Let masters follow weights that were changed outside the optimizer (`WeightVersion`)."""
        if self.master is None:
            return
        for row in rows:
            weight = self.weights[row]
            if self._seen[row] == WeightVersion.of(weight):
                continue
            segment = self.segment(row)
            if update_stale(self.master[segment], ops.packed_gather(weight.detach(), self.indices[segment])):
                logger.warning(
                    "%s was changed outside the optimizer; its fp32 master follows the new values", self.names[row]
                )
            self._mark(row)

    def _of(self, rows: Sequence[int]) -> Tensor:
        return self.steps if self._is_all(rows) else self.steps[self._row_tensor(tuple(rows))]

    def _is_all(self, rows: Sequence[int]) -> bool:
        return list(rows) == list(range(len(self.weights)))

    def _row_tensor(self, rows: tuple[int, ...]) -> Tensor:
        """``rows`` on the device. It is cached: a step uploads nothing and can be captured."""
        if rows not in self._row_tensors:
            self._row_tensors[rows] = torch.tensor(rows, dtype=torch.int64).to(self.steps.device, non_blocking=True)
        return self._row_tensors[rows]

    def _mark(self, row: int) -> None:
        self._seen[row] = WeightVersion.of(self.weights[row])

    def _migrated(self, row: int, new: Tensor, backend: str | None) -> dict[str, Tensor]:
        """The state of matrix ``row`` for the index list ``new``."""
        old = self.indices[self.segment(row)]
        out = {"indices": new}
        for name, arena in self.buffers().items():
            if name == "indices":
                continue
            fill = None
            if name == "master":
                fill = ops.packed_gather(self.weights[row].detach(), new, dtype=torch.float32)
            elif name == "births":
                fill = self.steps[row].to(torch.int32).expand(new.shape).contiguous()
            out[name] = ops.packed_migrate(arena[self.segment(row)], old, new, fill_values=fill, backend=backend)
        return out

    def _migrate_resized(self, lists: dict[int, Tensor], backend: str | None) -> None:
        """Rebuild the arena, because some matrix has another number of entries than before."""
        entries = []
        for i in range(len(self.weights)):
            entry = self._migrated(i, lists[i], backend) if i in lists else self.views(i)
            entries.append({"step": self.steps[i], **entry})
        form = {"master": self.master is not None, "births": self.births is not None}
        rebuilt = PackedState(self.indices.device, self.exp_avg.dtype, **form)
        rebuilt.append(self.weights, entries, self.names)
        self.__dict__ = rebuilt.__dict__

    def _fill(self, i: int, weight: Tensor, entry: dict[str, Tensor]) -> None:
        segment = self.segment(i)
        for name, arena in self.buffers().items():
            if name in entry:
                arena[segment] = entry[name].to(device=arena.device, dtype=arena.dtype)
            elif name == "master":
                arena[segment] = ops.packed_gather(weight.detach(), self.indices[segment], dtype=torch.float32)
            elif name == "births":
                arena[segment] = self.steps[i].to(torch.int32)
        if "master" not in entry:  # A given master may be older than the weight. The next step compares them.
            self._mark(i)

    def _check_entry(self, weight: Tensor, entry: dict[str, Tensor], name: str) -> None:
        indices = entry["indices"]
        check_matrix(weight, name)
        require(
            weight.device == self.indices.device,
            f"{name}: the weight is on {weight.device}, the state on {self.indices.device}",
        )
        check_index_list(indices, weight.numel(), name)
        for key in self.buffers():
            value = entry.get(key)
            require(
                value is None or value.shape == indices.shape,
                f"{name}: {key} has {getattr(value, 'numel', int)()} entries, its index list {indices.numel()}",
            )
