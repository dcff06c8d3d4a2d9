"""From low-rank factors to sorted index lists: the k entries of largest |W_r|, without W_r."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import bracket, ops
from .checks import MAX_ENTRIES, require
from .lowrank import TOLERANCE, LowRankFactors, batched_factors

MEMORY_BUDGET = 2**31
"""Bytes of fp32 copies of weights that are factored together on a GPU. On the CPU one matrix at a
time is enough for a core.
"""
_SMALL = 2**22  # entries


@dataclass(frozen=True)
class MaskRequest:
    """What a mask is made from: the matrix, its rank and k, and what its last mask left for a warm
    start.
    """

    weight: Tensor
    rank: int
    k: int
    name: str = "weight"
    basis: Tensor | None = None
    threshold: Tensor | None = None


class Mask(NamedTuple):
    """``indices``: sorted int32 (k,). ``threshold`` (0-dim fp32, the k-th magnitude) and ``basis``
    serve the next warm start.

    How it came about: ``method``, ``passes`` over the matrix, whether the iteration ``settled``,
    ``seconds`` (a share of its batch's).
    """

    indices: Tensor
    threshold: Tensor | None = None
    basis: Tensor | None = None
    method: str = ""
    passes: int = 0
    settled: bool = True
    seconds: float = 0.0


def principal_indices(
    weight: Tensor,
    rank: int,
    k: int | None = None,
    density: float | None = None,
    budget_rank: int | None = None,
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    warm_start: Tensor | None = None,
    tolerance: float = TOLERANCE,
    name: str = "weight",
    backend: str | None = None,
) -> Tensor:
    """The principal weights of a matrix (m x n): flat, sorted int32 positions of the k largest
    |W_r| (paper section 3).

    Exactly one of ``k``, ``density`` (k = round(density * m * n)) and ``budget_rank`` (k = (m + n)
    * budget_rank, at most m * n) says how many; ties go to the lower position. The weight itself is
    not changed. ``method``, ``generator``, ``warm_start`` and ``tolerance`` are those of
    `low_rank_factors`.

    Raises ValueError, naming ``name``, for a rank or a k out of range and for non-finite weights.
    """
    require(weight.dim() == 2, f"{name}: a matrix is needed, got shape {tuple(weight.shape)}")
    k = entry_count(weight.shape, k=k, density=density, budget_rank=budget_rank, name=name)
    request = MaskRequest(weight, rank, k, name, warm_start)
    return principal_masks([request], method=method, generator=generator, tolerance=tolerance, backend=backend)[
        0
    ].indices


def principal_masks(
    requests: Sequence[MaskRequest],
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    tolerance: float = TOLERANCE,
    memory_budget: int | None = None,
    backend: str | None = None,
    made: Callable[[int], object] = lambda count: None,
) -> list[Mask]:
    """Masks of many matrices; those of one shape, dtype, rank and device are factored together
    within ``memory_budget`` bytes.

    Small matrices on the CPU are spread over the cores instead, one thread each. A given
    ``generator`` keeps them in order.

    ``made(count)`` is called after every batch, for a progress bar. Raises as `principal_indices`
    does, before or between batches; nothing is changed in any case.
    """
    batches = _batches(requests, memory_budget)
    masks: dict[int, Mask] = {}

    def make(batch: list[int]) -> list[Mask]:
        return _batch_masks([requests[i] for i in batch], method, generator, tolerance, backend)

    def keep(batch: list[int], found: list[Mask]) -> None:
        masks.update(zip(batch, found))
        made(len(batch))

    # Triton on CPU tensors is its interpreter, which is not made for several threads.
    spread = generator is None and backend != "triton"
    small = [batch for batch in batches if spread and _is_small(requests[batch[0]].weight)]
    for batch in batches:
        if batch not in small:
            keep(batch, make(batch))
    with _single_threaded(len(small)) as pool:
        for batch, found in zip(small, pool.map(make, small)):
            keep(batch, found)
    return [masks[i] for i in range(len(requests))]


def _batch_masks(
    requests: list[MaskRequest], method: str, generator: torch.Generator | None, tolerance: float, backend: str | None
) -> list[Mask]:
    """Masks of matrices of one shape, dtype, rank and device."""
    start = time.perf_counter()
    factors = batched_factors(
        [r.weight for r in requests],
        requests[0].rank,
        method=method,
        generator=generator,
        tolerance=tolerance,
        warm_starts=[r.basis for r in requests],
        names=[r.name for r in requests],
    )
    chosen: dict[int, tuple[Tensor, Tensor]] = {}
    for k in sorted({r.k for r in requests}):
        members = [i for i, r in enumerate(requests) if r.k == k]
        thresholds = [requests[i].threshold for i in members]
        chosen.update(zip(members, zip(*_select([factors[i] for i in members], k, thresholds, backend))))
    seconds = (time.perf_counter() - start) / len(requests)
    return [Mask(*chosen[i], f.basis, f.method, f.passes, f.settled, seconds) for i, f in enumerate(factors)]


def _select(
    factors: list[LowRankFactors], k: int, thresholds: list[Tensor | None], backend: str | None
) -> tuple[Tensor, Tensor]:
    """Index lists (b, k) and k-th magnitudes (b,) of b products, near which ``thresholds`` lie
    where they are known.

    On a GPU, bitmaps (twice 1/8 byte an entry) and candidates (4 bytes for each of the k) take the
    place of the fp32 copies (4 bytes an entry), which are free again: the memory budget holds.
    """
    expected = None
    if any(threshold is not None for threshold in thresholds):
        expected = torch.stack(
            [
                bracket.sampled(f.left, f.right, k) if threshold is None else bracket.around(threshold)
                for f, threshold in zip(factors, thresholds)
            ]
        )
    left, right = _stacked([f.left for f in factors]), _stacked([f.right for f in factors])
    return ops.lowrank_topk(left, right, k, bracket=expected, backend=backend)


def _stacked(matrices: list[Tensor]) -> Tensor:
    """One batch of matrices of one shape; a view of a single one."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]


def _is_small(weight: Tensor) -> bool:
    """Whether one core does a matrix best by itself: the small factorizations of several cores wait
    for each other.
    """
    return weight.device.type == "cpu" and weight.numel() <= _SMALL


@contextmanager
def _single_threaded(count: int) -> Iterator[ThreadPoolExecutor]:
    """Up to ``count`` workers that compute with one thread each, as many as torch has threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(max(1, min(count, threads)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if count:
            torch.set_num_threads(threads)  # of threads to come: the workers have set it for them too


def _batches(requests: Sequence[MaskRequest], memory_budget: int | None) -> list[list[int]]:
    """Numbers of requests that go through together, in order of their first."""
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for i, r in enumerate(requests):
        basis = None if r.basis is None else tuple(r.basis.shape)
        kinds[(r.weight.shape, r.weight.dtype, r.weight.device, r.rank, basis)].append(i)
    batches = []
    for members in kinds.values():
        weight = requests[members[0]].weight
        budget = memory_budget if memory_budget is not None else MEMORY_BUDGET if weight.is_cuda else 0
        size = max(1, budget // (4 * max(1, weight.numel())))
        batches += [members[at : at + size] for at in range(0, len(members), size)]
    return batches


def entry_count(
    shape: torch.Size,
    *,
    k: int | None = None,
    density: float | None = None,
    budget_rank: int | None = None,
    name: str = "weight",
) -> int:
    """How many entries of an m x n matrix are trained, from exactly one of the three ways to say
    it.
    """
    given = [
        label for label, value in (("k", k), ("density", density), ("budget_rank", budget_rank)) if value is not None
    ]
    require(
        len(given) == 1, f"{name}: give exactly one of k, density and budget_rank, got {' and '.join(given) or 'none'}"
    )
    m, n = shape
    require(m * n <= MAX_ENTRIES, f"{name}: a matrix may have up to 2^31-1 entries, got {m} x {n}")
    if budget_rank is not None:
        require(
            isinstance(budget_rank, int) and budget_rank >= 1,
            f"{name}: budget_rank must be an integer of at least 1, got {budget_rank!r}",
        )
        return min((m + n) * budget_rank, m * n)
    if density is not None:
        require(0.0 < density <= 1.0, f"{name}: density must be in (0, 1], got {density}")
        return max(1, round(density * m * n))
    assert k is not None
    require(isinstance(k, int) and 1 <= k <= m * n, f"{name}: k must be an integer from 1 to {m * n}, got {k!r}")
    return k


def largest_indices(magnitude: Tensor, k: int) -> Tensor:
    """Flat, sorted int32 positions of the k largest entries of a non-negative tensor; ties go to
    the lower position.
    """
    flat = magnitude.reshape(-1)
    chosen = flat > (threshold := _kth_largest(flat, k))
    ties = (flat == threshold).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten().int()


def random_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    """k distinct flat positions drawn uniformly, sorted int32; the same for the same seed on every
    device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:k].sort().values.int().to(device)


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    place = flat.numel() - k
    if flat.device.type == "cpu":  # numpy's introselect is ten times faster than torch.kthvalue
        return torch.from_numpy(np.partition(flat.float().numpy(), place)[place : place + 1])[0]
    return torch.kthvalue(flat, place + 1).values
