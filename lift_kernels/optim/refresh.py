"""The refresh schedule: which matrices are due for a new mask; and the report of a refresh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks.principal import Mask
from .matrix_ref import MatrixRef


@dataclass(frozen=True)
class MatrixRefresh:
    """What a refresh did to one matrix.

    Attributes:
        name: of the parameter.
        method: ``"gram"``, ``"chebyshev"`` (cold), ``"warm"``, ``"cold after warm"`` (the warm
            start did not converge) or the selection.
        entries: k.
        passes: products with the matrix or its transpose.
        converged: False when the iteration ended before its Ritz energy stalled.
        overlap: share of the k entries that were in the old mask, None for a first mask.
        seconds: that its mask took.
    """

    name: str
    method: str
    entries: int
    passes: int
    converged: bool
    overlap: float | None
    seconds: float

    @property
    def settled(self) -> bool:
        """The old name of ``converged``; it goes with the next release."""
        return self.converged


@dataclass(frozen=True)
class RefreshReport:
    """One refresh, matrix by matrix."""

    matrices: tuple[MatrixRefresh, ...]

    @property
    def seconds(self) -> float:
        """Seconds that all masks took together."""
        return sum(matrix.seconds for matrix in self.matrices)

    @property
    def overlap(self) -> float | None:
        """Share of all entries that stayed, or None for first masks."""
        known = [
            (matrix.overlap * matrix.entries, matrix.entries) for matrix in self.matrices if matrix.overlap is not None
        ]
        return sum(stayed for stayed, _ in known) / max(1, sum(k for _, k in known)) if known else None

    @property
    def not_converged(self) -> tuple[str, ...]:
        """Names of the matrices whose iteration ended before its Ritz energy stalled."""
        return tuple(matrix.name for matrix in self.matrices if not matrix.converged)

    @property
    def unsettled(self) -> tuple[str, ...]:
        """The old name of ``not_converged``; it goes with the next release."""
        return self.not_converged


def report_on(due: Sequence[MatrixRef], masks: Sequence[Mask], stayed: Sequence[Tensor] | None) -> RefreshReport:
    """The report of the new ``masks`` of the matrices ``due``.

    ``stayed`` says how many entries each mask shares with the one before, as tensors on the device.
    None stands for first masks.
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
            if found_inf is not None and not spread:
                # GradScaler adds up the flags of all devices.
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
