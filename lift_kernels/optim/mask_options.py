"""MaskOptions: how an optimizer makes masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..masks.principal import Mask
from ..masks.selection import make_masks
from .matrix_ref import MatrixRef
from .several_ranks import Replicas


class MaskOptions(NamedTuple):
    """How masks are made, by which ranks, and where their bases are kept; see LiftAdamW."""

    selection: str | Callable[[Tensor, int], Tensor]
    seed: int
    method: str
    backend: str | None
    warm_start: str | None
    replicas: Replicas

    def make(self, refs: Sequence[MatrixRef]) -> list[Mask]:
        """A mask from the present weight of each matrix."""
        return make_masks(
            [ref.request() for ref in refs],
            selection=self.selection,
            seed=self.seed,
            method=self.method,
            backend=self.backend,
            replicas=self.replicas,
            keep_bases=self.warm_start is not None,
        )
