"""From low-rank factors to sorted index lists: the k entries of largest |W_r|, without W_r."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import threshold_bracket
from .budget import check_rank, entry_count
from .costs import factoring_bytes
from .lowrank import TOLERANCE, LowRankFactors, batched_factors, factored_dtype, small_factors

MEMORY_BUDGET = 3 * 2**30
"""The most bytes for the matrices that are factored together on a GPU: their copies, and the blocks
of the iteration (`memory_budget_of`)."""
BUDGET_SHARE = 24
"""One part in so many of a GPU's memory is their budget. It depends on the GPU alone, so that a
run that is resumed makes the same batches."""
_SMALL = 2**22  # entries


@dataclass(frozen=True)
class MaskRequest:
    """What a mask is made from.

    Attributes:
        weight: (m, n), fp32, bf16 or fp16.
        rank, k: of the approximation, and how many entries are selected.
        name: for messages.
        basis, threshold: of the last mask, for a warm start.
    """

    weight: Tensor
    rank: int
    k: int
    name: str = "weight"
    basis: Tensor | None = None
    threshold: Tensor | None = None


class Mask(NamedTuple):
    """The selected entries of a matrix, and how they were found.

    Attributes:
        indices: (k,) int32, sorted flat positions.
        threshold: 0-dim fp32, the k-th magnitude; with ``basis`` it serves the next warm start.
        basis: of `LowRankFactors`.
        method, passes, converged: of `LowRankFactors`, or the name of another selection.
        seconds: its share of the time of its batch.
    """

    indices: Tensor
    threshold: Tensor | None = None
    basis: Tensor | None = None
    method: str = ""
    passes: int = 0
    converged: bool = True
    seconds: float = 0.0

    @property
    def settled(self) -> bool:
        """The old name of ``converged``; it goes with the next release."""
        return self.converged


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
    """The principal weights of a matrix: positions of its k largest |W_r| (paper section 3).

    Args:
        weight: (m, n), fp32, bf16 or fp16; it is not changed.
        rank: r of the approximation W_r.
        k, density, budget_rank: exactly one of them says how many entries are selected: k,
            round(density * m * n), or (m + n) * budget_rank, at most m * n.
        method, generator, warm_start, tolerance: of `low_rank_factors`.
        name: of the weight, for messages.
        backend: one of `lift_kernels.backends`, None for the fastest usable one.

    Returns:
        (k,) int32, flat and sorted. Ties go to the lower position.

    Raises ValueError, naming ``name``, for a rank or a k out of range and for non-finite weights.
    """
    if weight.dim() != 2:
        raise ValueError(f"{name}: a matrix is needed, got shape {tuple(weight.shape)}")
    k = entry_count(weight.shape, k=k, density=density, budget_rank=budget_rank, name=name)
    check_rank(rank, weight.shape, name)
    with torch.no_grad():
        # Asked for first, because a small matrix notices the checks and lists of a batch.
        usual = method == "auto" and warm_start is None and tolerance == TOLERANCE
        factors = small_factors(weight, rank) if usual else None
        if factors is None:
            (factors,) = batched_factors(
                [weight],
                rank,
                method=method,
                generator=generator,
                warm_starts=[warm_start],
                tolerance=tolerance,
                names=[name],
            )
        return ops.lowrank_topk(factors.left, factors.right, k, backend=backend)[0]


def principal_masks(
    requests: Sequence[MaskRequest],
    *,
    method: str = "auto",
    generator: torch.Generator | None = None,
    tolerance: float = TOLERANCE,
    memory_budget: int | None = None,
    backend: str | None = None,
    on_batch_done: Callable[[int], object] = lambda count: None,
) -> list[Mask]:
    """Masks of many matrices, in the order of the requests.

    Matrices of one shape, dtype, rank and device are factored together. Small matrices on the CPU
    are spread over the cores instead. A single one uses all cores.

    Args:
        method, generator, tolerance: of `low_rank_factors`. A given ``generator`` keeps the
            matrices in order.
        memory_budget: bytes for matrices that are factored together, at least one, as
            `costs.factoring_bytes` counts them; None: `memory_budget_of` their device.
        on_batch_done: is called with the number of masks after every batch, for a progress bar.

    Raises as `principal_indices` does, before or between batches. Nothing is changed in any case.
    """
    batches = _batches(requests, memory_budget, method)
    masks: dict[int, Mask] = {}

    def make(batch: list[int]) -> list[Mask]:
        return _batch_masks([requests[i] for i in batch], method, generator, tolerance, backend)

    def keep(batch: list[int], found: list[Mask]) -> None:
        masks.update(zip(batch, found))
        on_batch_done(len(batch))

    # On CPU tensors Triton runs in its interpreter, which is not made for several threads.
    spread = generator is None and backend != "triton"
    small = [batch for batch in batches if spread and _is_small(requests[batch[0]].weight)]
    if len(small) == 1:  # A pool would only take time to start.
        small = []
    for batch in batches:
        if batch not in small:
            keep(batch, make(batch))
    if small:
        with _workers(len(small)) as pool:
            for batch, found in zip(small, pool.map(make, small)):
                keep(batch, found)
    return [masks[i] for i in range(len(requests))]


@torch.no_grad()  # Worker threads do not inherit it. Ops skip the dispatcher where nothing is recorded.
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
    return [Mask(*chosen[i], f.basis, f.method, f.passes, f.converged, seconds) for i, f in enumerate(factors)]


def _select(
    factors: list[LowRankFactors], k: int, thresholds: list[Tensor | None], backend: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Index lists (k,) and k-th magnitudes (0-dim) of b products.

    ``thresholds`` are the k-th magnitudes of the last masks, where they are known. On a GPU,
    bitmaps (twice 1/8 byte per entry) and candidates (4 bytes for each of the k) need less than the
    copies of the weights (2 or 4 bytes per entry), which are free again. So the memory budget
    holds for a k below 0.4 m n.
    """
    known = [threshold for threshold in thresholds if threshold is not None]
    expected = threshold_bracket.around(torch.stack(known)) if known else None
    if expected is not None and len(known) < len(thresholds):
        rest = iter(expected)
        expected = torch.stack(
            [
                threshold_bracket.sampled(f.left, f.right, k) if threshold is None else next(rest)
                for f, threshold in zip(factors, thresholds)
            ]
        )
    if len(factors) == 1:
        bracket = None if expected is None else expected[0]
        indices, magnitude = ops.lowrank_topk(factors[0].left, factors[0].right, k, bracket=bracket, backend=backend)
        return [indices], [magnitude]
    left, right = torch.stack([f.left for f in factors]), torch.stack([f.right for f in factors])
    lists, magnitudes = ops.lowrank_topk(left, right, k, bracket=expected, backend=backend)
    return list(lists), list(magnitudes)


def _is_small(weight: Tensor) -> bool:
    """Whether a matrix is done best by one core.

    In small factorizations several cores wait for each other.
    """
    return weight.device.type == "cpu" and weight.numel() <= _SMALL


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Up to ``count`` workers that share torch's threads evenly."""
    threads = torch.get_num_threads()
    workers = max(1, min(count, threads))
    share = threads // workers
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # The workers have set it for threads to come, too.


def memory_budget_of(device: torch.device) -> int:
    """Bytes for matrices that are factored together on a device, at least one.

    On the CPU one matrix at a time keeps a core busy.
    """
    if device.type != "cuda":
        return 0
    if not torch.cuda.is_available():  # tensors without numbers
        return MEMORY_BUDGET
    return min(MEMORY_BUDGET, torch.cuda.get_device_properties(device).total_memory // BUDGET_SHARE)


def _batches(requests: Sequence[MaskRequest], memory_budget: int | None, method: str) -> list[list[int]]:
    """Numbers of the requests that are factored together, in order of their first."""
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for i, r in enumerate(requests):
        basis = None if r.basis is None else tuple(r.basis.shape)
        kinds[(r.weight.shape, r.weight.dtype, r.weight.device, r.rank, basis)].append(i)
    batches = []
    for members in kinds.values():
        weight, rank = requests[members[0]].weight, requests[members[0]].rank
        budget = memory_budget if memory_budget is not None else memory_budget_of(weight.device)
        size = 1
        if budget and weight.dim() == 2:
            each = factoring_bytes(weight.shape, rank, factored_dtype(weight).itemsize, method)
            size = max(1, budget // max(1, each))
        batches += [members[at : at + size] for at in range(0, len(members), size)]
    return batches
