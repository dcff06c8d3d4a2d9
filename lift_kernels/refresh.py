"""Refreshes: which matrices are due, how their new masks are selected, and a report of what came of
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import options, owners
from .checks import check_finite, check_index_list
from .masks import Mask, MaskRequest, largest_indices, principal_masks, random_indices

BAR_DELAY = 5.0
"""Seconds after which the masks of a model get a progress bar."""


@dataclass(frozen=True)
class MatrixRefresh:
    """What a refresh did to one matrix.

    ``method``: ``"gram"``, ``"chebyshev"`` (cold), ``"warm"``, ``"cold after warm"`` (the warm
    start did not settle) or the selection. ``entries``: k. ``passes`` over the matrix; whether the
    iteration ``settled``; ``overlap`` with the old mask as a share of k, None for a first mask;
    ``seconds``.
    """

    name: str
    method: str
    entries: int
    passes: int
    settled: bool
    overlap: float | None
    seconds: float


@dataclass(frozen=True)
class RefreshReport:
    """One refresh, matrix by matrix."""

    matrices: tuple[MatrixRefresh, ...]

    @property
    def seconds(self) -> float:
        """Of all masks together."""
        return sum(matrix.seconds for matrix in self.matrices)

    @property
    def overlap(self) -> float | None:
        """Share of all entries that stayed, or None for first masks."""
        known = [
            (matrix.overlap * matrix.entries, matrix.entries) for matrix in self.matrices if matrix.overlap is not None
        ]
        return sum(stayed for stayed, _ in known) / max(1, sum(k for _, k in known)) if known else None

    @property
    def unsettled(self) -> tuple[str, ...]:
        """Names of the matrices whose iteration ended before its Ritz energy stalled."""
        return tuple(matrix.name for matrix in self.matrices if not matrix.settled)


class Due(NamedTuple):
    """A matrix that needs a mask. ``number`` is its place among all sparse parameters of the
    optimizer.
    """

    number: int
    parameter: Tensor
    group: dict[str, Any]
    name: str


def make_masks(
    due: Sequence[Due],
    kept: dict[Tensor, dict[str, Tensor]],
    *,
    selection: str | Callable[[Tensor, int], Tensor],
    seed: int,
    method: str,
    backend: str | None,
) -> list[Mask]:
    """A mask for every matrix, from its present weight. ``kept``: basis and threshold of each
    matrix's last mask.

    Raises ValueError, naming the parameter, for non-finite weights, a missing gradient, a wrong
    list of a callable.
    """
    parts = [_parts(d, kept.get(d.parameter, {})) for d in due]
    flat = [part for of_one in parts for part in of_one]
    if selection == "principal":
        with _bar(len(flat)) as bar:
            found = principal_masks([part.request() for part in flat], method=method, backend=backend, made=bar.update)
    else:
        found = [
            part.mask(selection, seed + d.number + 1_000_003 * i)
            for d, ps in zip(due, parts)
            for i, part in enumerate(ps)
        ]
    rest = iter(found)
    return [_joined([next(rest) for _ in of_one], of_one[0].matrix.numel()) for of_one in parts]


class _Part(NamedTuple):
    """A matrix that needs a mask: a parameter's, or one of its 3-D batch."""

    matrix: Tensor
    grad: Tensor | None
    group: dict[str, Any]
    name: str
    kept: dict[str, Tensor]

    def request(self) -> MaskRequest:
        rank = options.rank_of(self.matrix, self.group)
        # A basis narrower than a raised rank is of no use.
        kept = {key: t.to(self.matrix.device) for key, t in self.kept.items() if key != "basis" or t.shape[1] >= rank}
        return MaskRequest(
            self.matrix, rank, options.trained_entries(self.matrix, self.group, self.name), self.name, **kept
        )

    def mask(self, selection: str | Callable[[Tensor, int], Tensor], seed: int) -> Mask:
        """By one of the selections that are no principal weights."""
        start = time.perf_counter()
        k = options.trained_entries(self.matrix, self.group, self.name)
        indices = _selected(selection, self.matrix, self.grad, k, self.name, seed)
        label = selection if isinstance(selection, str) else getattr(selection, "__name__", "callable")
        return Mask(indices, method=label, seconds=time.perf_counter() - start)


def _parts(due: Due, kept: dict[str, Tensor]) -> list[_Part]:
    matrix = owners.matrix_of(due.parameter).detach()
    grad = due.parameter.grad if due.parameter.shape == matrix.shape else None
    if matrix.dim() == 2:
        return [_Part(matrix, grad, due.group, due.name, kept)]
    return [
        _Part(
            matrix[i],
            None if grad is None else grad[i],
            due.group,
            f"{due.name}[{i}]",
            {key: t[i] for key, t in kept.items()},
        )
        for i in range(len(matrix))
    ]


def _joined(masks: list[Mask], numel: int) -> Mask:
    """One mask of the masks of a batch of matrices with ``numel`` entries each."""
    if len(masks) == 1:
        return masks[0]
    return masks[0]._replace(
        indices=torch.cat([m.indices + i * numel for i, m in enumerate(masks)]),
        basis=_stacked([m.basis for m in masks]),
        threshold=_stacked([m.threshold for m in masks]),
        passes=max(m.passes for m in masks),
        settled=all(m.settled for m in masks),
        seconds=sum(m.seconds for m in masks),
    )


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    known = [t for t in tensors if t is not None]
    return torch.stack(known) if len(known) == len(tensors) else None


def warm_part(entry: dict[str, Any], p: Tensor, where: str | None) -> dict[str, Tensor]:
    """``basis`` and ``threshold`` of a mask or of a saved state, moved to where they are kept;
    nothing for ``where=None``.
    """
    if where is None:
        return {}
    target = p.device if where == "device" else torch.device("cpu")
    return {key: entry[key].to(target) for key in ("basis", "threshold") if entry.get(key) is not None}


def _selected(
    selection: str | Callable[[Tensor, int], Tensor], matrix: Tensor, grad: Tensor | None, k: int, name: str, seed: int
) -> Tensor:
    check_finite(matrix, name)
    if selection == "random":
        return random_indices(matrix.numel(), k, seed, matrix.device)
    if selection == "magnitude":
        return largest_indices(matrix.abs(), k)
    if selection == "gradient":
        if grad is None:
            raise ValueError(
                f"{name}: selection='gradient' needs a dense gradient when a mask is made; refresh after backward()"
            )
        check_finite(grad, f"gradient of {name}")
        return largest_indices(grad.abs(), k)
    assert callable(selection)
    indices = selection(matrix, k)
    check_index_list(indices, matrix.numel(), name, matrix.device)
    return indices


def report_on(due: Sequence[Due], masks: Sequence[Mask], stayed: Sequence[Tensor] | None) -> RefreshReport:
    """``stayed``: how many entries each mask shares with the one before, on the device; None for
    first masks.
    """
    shared: Sequence[int | None] = [None] * len(masks)
    if stayed:
        shared = torch.stack([count.to(stayed[0].device) for count in stayed]).tolist()  # one wait for the device
    return RefreshReport(
        tuple(
            MatrixRefresh(
                d.name, m.method, k := m.indices.numel(), m.passes, m.settled, None if s is None else s / k, m.seconds
            )
            for d, m, s in zip(due, masks, shared)
        )
    )


def spread_share(due: Sequence[Due], step: int, interval: int) -> list[Due]:
    """The matrices whose turn it is at ``step`` of 1..interval, so that each has one turn in an
    interval.
    """
    n = len(due)
    return list(due[n * (step - 1) // interval : n * step // interval])


class _NoBar:
    """Stands in for tqdm where it is not installed."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, count: int) -> None:
        pass


def _bar(total: int):
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, desc="masks", unit="matrix", delay=BAR_DELAY, leave=False)
