"""Refreshes: which matrices are due for a new mask, the refresh itself, and its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks.principal import Mask
from ..ops import dispatch
from . import drift
from .mask_options import MaskOptions
from .matrix_ref import MatrixRef
from .matrix_table import MatrixTable


@dataclass(frozen=True)
class MatrixRefresh:
    """What a refresh did to one matrix.

    Attributes:
        name: of the parameter.
        method: ``"gram"``, ``"full rank"``, ``"chebyshev"`` (cold), ``"warm"``, ``"cold after
            warm"`` (the warm start did not converge) or the selection.
        entries: k.
        passes: products with the matrix or its transpose.
        converged: False when the iteration ended before its Ritz energy stalled.
        overlap: share of the k entries that were in the old mask, None for a first mask.
        seconds: that its mask took.
        predicted: overlap that the drift of its entries let expect, None without ``refresh_drift``.
    """

    name: str
    method: str
    entries: int
    passes: int
    converged: bool
    overlap: float | None
    seconds: float
    predicted: float | None = None

    @property
    def settled(self) -> bool:
        """The old name of ``converged``; it goes with the next release."""
        return self.converged


class SkippedRefresh(NamedTuple):
    """A matrix that was due and kept its mask, because it had drifted less than ``refresh_drift``.

    Attributes:
        name: of the parameter.
        entries: k.
        predicted: overlap that its mask would have with a new one, by prediction.
    """

    name: str
    entries: int
    predicted: float


@dataclass(frozen=True)
class RefreshReport:
    """One refresh, matrix by matrix.

    Attributes:
        matrices: those that got a new mask.
        skipped: those that were due and kept theirs.
    """

    matrices: tuple[MatrixRefresh, ...]
    skipped: tuple[SkippedRefresh, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds that all masks took together."""
        return sum(matrix.seconds for matrix in self.matrices)

    @property
    def overlap(self) -> float | None:
        """Share of all entries that stayed, or None for first masks and where none was renewed."""
        return _mean((matrix.overlap, matrix.entries) for matrix in self.matrices)

    @property
    def predicted_overlap(self) -> float | None:
        """Predicted overlap of all skipped masks with new ones, or None where none was skipped."""
        return _mean((matrix.predicted, matrix.entries) for matrix in self.skipped)

    @property
    def not_converged(self) -> tuple[str, ...]:
        """Names of the matrices whose iteration ended before its Ritz energy stalled."""
        return tuple(matrix.name for matrix in self.matrices if not matrix.converged)

    @property
    def unsettled(self) -> tuple[str, ...]:
        """The old name of ``not_converged``; it goes with the next release."""
        return self.not_converged

    def __str__(self) -> str:
        """One line: how many masks were renewed and skipped, and their overlaps."""
        due = len(self.matrices) + len(self.skipped)
        text = f"{len(self.matrices)} of {due} matrices"
        if self.overlap is not None:
            text += f" (overlap {self.overlap:.4f})"
        if self.predicted_overlap is not None:
            text += f", {len(self.skipped)} skipped (predicted overlap {self.predicted_overlap:.4f})"
        return text


def _mean(shares: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of known shares of entries, each with its number of entries."""
    known = [(share, entries) for share, entries in shares if share is not None]
    return sum(share * k for share, k in known) / max(1, sum(k for _, k in known)) if known else None


def renew(
    table: MatrixTable, due: Sequence[MatrixRef], options: MaskOptions, state: dict[Tensor, Any], always: bool = False
) -> RefreshReport:
    """New masks for the matrices ``due``, which have one, where the old mask has drifted.

    Args:
        always: renew them whatever their drift.
        state: of the optimizer, which shows the new masks.
    """
    drifts = drift.predict(due) if options.selection == "principal" else {}
    stale = [ref for ref in due if always or drift.is_stale(ref, drifts.get(ref))]
    renewed = set(stale)
    kept = [ref for ref in due if ref not in renewed]
    report = RefreshReport(())
    if stale or options.replicas.group is not None:  # Another rank may have stale masks. That must be an error.
        report = report_on(stale, *table.renew(stale, options, state), drifts)
    for ref, matrix in zip(stale, report.matrices):
        if ref in drifts and matrix.overlap is not None:
            drift.learn(ref, drifts[ref], matrix.entries, round((1 - matrix.overlap) * matrix.entries))
    # Replicas must have kept the same masks. They compare them as they compare new ones.
    table.unseen.update(dict.fromkeys(kept))
    skipped = (SkippedRefresh(ref.name, ref.entries(), _overlap(drifts[ref])) for ref in kept)
    return replace(report, skipped=tuple(skipped))


def _overlap(drifted: drift.Drift) -> float:
    return max(0.0, 1 - drifted.changed)


def report_on(
    due: Sequence[MatrixRef],
    masks: Sequence[Mask],
    stayed: Sequence[Tensor] | None,
    drifts: Mapping[MatrixRef, drift.Drift] | None = None,
) -> RefreshReport:
    """The report of the new ``masks`` of the matrices ``due``.

    ``stayed`` says how many entries each mask shares with the one before, as tensors on the device.
    None stands for first masks. ``drifts`` are those before, where they are known.
    """
    shared: Sequence[int | None] = [None] * len(masks)
    if stayed:
        shared = torch.stack([count.to(stayed[0].device) for count in stayed]).tolist()  # one wait for the device
    return RefreshReport(
        tuple(
            MatrixRefresh(
                d.name,
                m.method,
                k := m.indices.numel(),
                m.passes,
                m.converged,
                None if s is None else s / max(1, k),
                m.seconds,
                _overlap(drifts[d]) if drifts and d in drifts else None,
            )
            for d, m, s in zip(due, masks, shared)
        )
    )


class RefreshSchedule:
    """Which groups and matrices are due for a new mask after a step.

    A group counts its own steps in ``steps_since_refresh``, which its state dict keeps. With
    ``refresh_schedule="all"`` every mask of a group is due after an interval. With ``"spread"``
    each matrix has one turn per interval.
    """

    def __init__(self) -> None:
        self._skipped: dict[int, Tensor | int] = {}  # by id of the group: skipped steps, not yet subtracted

    def count_step(self, groups: Iterable[dict[str, Any]], found_inf: Tensor | None) -> bool:
        """Count a step of these groups, and return whether some mask may be due.

        A step that ``found_inf`` skipped is subtracted later.
        """
        may_be_due = False
        for group in groups:
            group["steps_since_refresh"] += 1
            spread = group["refresh_schedule"] == "spread"
            if found_inf is not None and not spread and not dispatch.capturing():
                # GradScaler adds up the flags of all devices. A capture would compute nothing here.
                self._skipped[id(group)] = self._skipped.get(id(group), 0) + (found_inf != 0).int()
            may_be_due |= spread or self._is_due(group)
        return may_be_due

    def due(self, groups: Sequence[dict[str, Any]], refs: Sequence[MatrixRef]) -> list[MatrixRef]:
        """The matrices of these groups that are due for a new mask.

        Waits for the device only when an interval is over and some steps may have been skipped.
        """
        if any(self._is_due(group) for group in groups):
            self.subtract_skipped(groups)
        due = []
        for group in groups:
            own = [ref for ref in refs if ref.group is group and ref.arena is not None]
            due += own if self._is_due(group) else self.turn(group, own)
        return due

    def may_be_due_next(self, ref: MatrixRef, refs: Sequence[MatrixRef]) -> bool:
        """Whether a matrix may be due after the coming step, if all ``refs`` have a mask.

        It is not, although this says so, when a skipped step was counted.
        """
        ahead = ref.group | {"steps_since_refresh": ref.group["steps_since_refresh"] + 1}
        return self._is_due(ahead) or ref in self.turn(ahead, [r for r in refs if r.group is ref.group])

    def turn(self, group: dict[str, Any], matrices: Sequence[MatrixRef]) -> list[MatrixRef]:
        """The matrices of a spread group whose turn it is; none in a group with another schedule.

        The count of steps starts again after an interval.
        """
        interval, step = group["refresh_interval"], group["steps_since_refresh"]
        if group["refresh_schedule"] != "spread" or interval is None:
            return []
        group["steps_since_refresh"] = step % interval
        n, step = len(matrices), min(step, interval)
        return list(matrices[n * (step - 1) // interval : n * step // interval])

    def restart(self, groups: Sequence[dict[str, Any]]) -> None:
        """Count from zero again in the groups whose interval is over."""
        for group in groups:
            if self._is_due(group):
                group["steps_since_refresh"] = 0

    def subtract_skipped(self, groups: Sequence[dict[str, Any]]) -> None:
        """Subtract skipped steps from the counts, when a refresh or a save is due.

        This is the only place that reads ``found_inf`` on the host.
        """
        for group in groups:
            group["steps_since_refresh"] -= int(self._skipped.pop(id(group), 0))

    @staticmethod
    def _is_due(group: dict[str, Any]) -> bool:
        interval = group["refresh_interval"]
        spread = group["refresh_schedule"] == "spread"
        return not spread and interval is not None and group["steps_since_refresh"] >= interval
