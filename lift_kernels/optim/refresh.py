"""Which matrices are due for a new mask, and the report of a refresh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks.principal import Mask


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


class MatrixRef(NamedTuple):
    """A matrix that an optimizer trains. ``number`` is its place among all sparse parameters."""

    number: int
    parameter: Tensor
    group: dict[str, Any]
    name: str


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
                d.name, m.method, k := m.indices.numel(), m.passes, m.converged, None if s is None else s / k, m.seconds
            )
            for d, m, s in zip(due, masks, shared)
        )
    )


def spread_share(due: Sequence[MatrixRef], step: int, interval: int) -> list[MatrixRef]:
    """The matrices whose turn it is at ``step`` of 1..interval. Each has one turn per interval."""
    n = len(due)
    return list(due[n * (step - 1) // interval : n * step // interval])
