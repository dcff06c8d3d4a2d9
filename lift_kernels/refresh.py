"""Refreshes: which matrices are due, how their new masks are selected, and a report of what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import options
from .checks import check_finite, check_index_list, require
from .masks import Mask, MaskRequest, largest_indices, principal_masks, random_indices

BAR_DELAY = 5.0
"""Seconds after which the masks of a model get a progress bar."""


@dataclass(frozen=True)
class MatrixRefresh:
    """What a refresh did to one matrix.

    ``method``: ``"gram"``, ``"chebyshev"`` (cold), ``"warm"``, ``"cold after warm"`` (the warm start did not settle) or the
    selection. ``passes`` over the matrix; whether the iteration ``settled``; ``overlap`` with the old mask as a share of k, None
    for a first mask; ``seconds``.
    """

    name: str
    method: str
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
        """Mean share of entries that stayed, or None for first masks."""
        known = [matrix.overlap for matrix in self.matrices if matrix.overlap is not None]
        return sum(known) / len(known) if known else None

    @property
    def unsettled(self) -> tuple[str, ...]:
        """Names of the matrices whose iteration ended before its Ritz energy stalled."""
        return tuple(matrix.name for matrix in self.matrices if not matrix.settled)


class Due(NamedTuple):
    """A matrix that needs a mask. ``number`` is its place among all sparse parameters of the optimizer."""

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
    """A mask for every matrix, from its present weight. ``kept``: basis and threshold of each matrix's last mask.

    Raises ValueError, naming the parameter, for non-finite weights, a missing gradient, a wrong list of a callable.
    """
    if selection == "principal":
        requests = []
        for _, p, group, name in due:
            rank, k = options.rank_of(p, group), options.trained_entries(p, group, name)
            requests.append(MaskRequest(p.detach(), rank, k, name, **_usable(kept.get(p, {}), p, rank)))
        with _bar(len(due)) as bar:
            return principal_masks(requests, method=method, backend=backend, made=bar.update)
    masks = []
    for number, p, group, name in due:
        start = time.perf_counter()
        indices = _selected(selection, p, options.trained_entries(p, group, name), name, seed + number)
        label = selection if isinstance(selection, str) else getattr(selection, "__name__", "callable")
        masks.append(Mask(indices, method=label, seconds=time.perf_counter() - start))
    return masks


def warm_part(entry: dict[str, Any], p: Tensor, where: str | None) -> dict[str, Tensor]:
    """``basis`` and ``threshold`` of a mask or of a saved state, moved to where they are kept; nothing for ``where=None``."""
    if where is None:
        return {}
    target = p.device if where == "device" else torch.device("cpu")
    return {key: entry[key].to(target) for key in ("basis", "threshold") if entry.get(key) is not None}


def _usable(kept: dict[str, Tensor], p: Tensor, rank: int) -> dict[str, Tensor]:
    """What is kept of the last mask, moved to the weight's device; a basis narrower than a raised rank is of no use."""
    return {
        key: value.to(p.device, non_blocking=True)
        for key, value in kept.items()
        if key != "basis" or value.shape[1] >= rank
    }


def _selected(selection: str | Callable[[Tensor, int], Tensor], p: Tensor, k: int, name: str, seed: int) -> Tensor:
    check_finite(p.detach(), name)
    if selection == "random":
        return random_indices(p.numel(), k, seed, p.device)
    if selection == "magnitude":
        return largest_indices(p.detach().abs(), k)
    if selection == "gradient":
        require(p.grad is not None and p.grad.shape == p.shape,
                f"{name}: selection='gradient' needs a dense gradient when a mask is made; refresh after backward()")  # fmt: skip
        assert p.grad is not None
        check_finite(p.grad, f"gradient of {name}")
        return largest_indices(p.grad.abs(), k)
    assert callable(selection)
    indices = selection(p.detach(), k)
    check_index_list(indices, p.numel(), name, p.device)
    return indices


def report_on(due: Sequence[Due], masks: Sequence[Mask], stayed: Sequence[Tensor] | None) -> RefreshReport:
    """``stayed``: how many entries each mask shares with the one before, on the device; None for first masks."""
    shared: Sequence[int | None] = [None] * len(masks)
    if stayed:
        shared = torch.stack([count.to(stayed[0].device) for count in stayed]).tolist()  # one wait for the device
    return RefreshReport(tuple(
        MatrixRefresh(d.name, m.method, m.passes, m.settled, None if s is None else s / max(1, m.indices.numel()), m.seconds)
        for d, m, s in zip(due, masks, shared)
    ))  # fmt: skip


def spread_share(due: Sequence[Due], step: int, interval: int) -> list[Due]:
    """The matrices whose turn it is at ``step`` of 1..interval, so that each has one turn in an interval."""
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
