"""Selection of the entries to train: principal weights, and the baselines beside them.

A callable with a true attribute ``numbered`` is called with ``number=``, too: that of the matrix,
which stays the same at a refresh (`block_selections.random_runs`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .._progress import progress_bar
from ..validation import check_finite, check_index_form, check_index_lists, require
from .chebyshev import exact_product
from .costs import mask_cost
from .lowrank import low_rank_factors
from .principal import MEMORY_BUDGET, Mask, MaskRequest, principal_masks
from .together import Replicas, agree_on_lists, agree_on_masks, make_together

SELECTIONS = ("principal", "off_principal", "magnitude", "gradient", "random")
BAR_DELAY = 5.0
"""Seconds after which the masks of a model get a progress bar."""
_BATCH_STRIDE = 1_000_003  # between the numbers of matrices of one batch
_BLOCK_BYTES = 16  # an entry of a row block of |W_r|: the product, scores, their copy for a partition, flags


class SelectionRequest(NamedTuple):
    """A matrix, or a 3-D batch of matrices, that needs a mask.

    Attributes:
        matrix: the present weight, detached.
        grad: its dense gradient, or None; only ``selection="gradient"`` reads it.
        rank: of the approximation that selects entries.
        k: entries to select in each matrix.
        name: of the parameter, for messages.
        number: of the parameter among all that get masks. Random masks of different numbers differ.
        kept: ``basis`` and ``threshold`` of the last mask, where there was one.
    """

    matrix: Tensor
    grad: Tensor | None
    rank: int
    k: int
    name: str
    number: int
    kept: dict[str, Tensor]

    def matrices(self) -> list[SelectionRequest]:
        """One request for each matrix of a batch."""
        if self.matrix.dim() == 2:
            return [self]
        return [
            self._replace(
                matrix=self.matrix[i],
                grad=None if self.grad is None else self.grad[i],
                name=f"{self.name}[{i}]",
                number=self.number + _BATCH_STRIDE * i,
                kept={key: t[i] for key, t in self.kept.items()},
            )
            for i in range(len(self.matrix))
        ]


@torch.no_grad()
def make_masks(
    requests: Sequence[SelectionRequest],
    *,
    selection: str | Callable[[Tensor, int], Tensor],
    seed: int,
    method: str = "auto",
    backend: str | None = None,
    replicas: Replicas | None = None,
    keep_bases: bool = True,
) -> list[Mask]:
    """A mask for every request, from its present weight.

    Args:
        selection: ``"principal"`` (paper section 3), ``"off_principal"`` (`off_principal_mask`),
            ``"magnitude"``, ``"gradient"``, ``"random"`` or a callable
            ``(weight, k) -> sorted int32 indices``, which every rank calls.
        seed: of random masks.
        method: of `low_rank_factors`.
        backend: one of `lift_kernels.backends`, None for the fastest usable one.
        replicas: the ranks that make the masks together, each a part, where they are a group.
        keep_bases: whether other ranks are sent bases and thresholds, too.

    Raises ValueError, naming the parameter, for non-finite weights, a missing gradient, a density
    that ``"off_principal"`` cannot have, or a wrong index list from a callable. Raises RuntimeError
    on every rank where they cannot work together.
    """
    parts = [request.matrices() for request in requests]
    flat = [part for of_one in parts for part in of_one]

    def make(chosen: Sequence[SelectionRequest]) -> list[Mask]:
        return _masks(chosen, selection, seed, method, backend, shown=group is None or dist.get_rank(group) == 0)

    group = None if replicas is None else replicas.group
    if replicas is not None and group is not None:
        agree_on_masks(flat, {"selection": _label(selection), "seed": seed, "mask_method": method}, replicas)
    if replicas is None or group is None:
        found = make(flat)
    elif callable(selection):  # It may keep count of its calls, or communicate by itself.
        found = make(flat)
        agree_on_lists(flat, found, replicas)
    else:
        found = make_together(flat, make, [_cost(p, selection) for p in flat], group, keep_bases=keep_bases)
    rest = iter(found)
    return [_joined([next(rest) for _ in of_one], of_one[0].matrix.numel()) for of_one in parts]


def _masks(
    parts: Sequence[SelectionRequest],
    selection: str | Callable[[Tensor, int], Tensor],
    seed: int,
    method: str,
    backend: str | None,
    shown: bool,
) -> list[Mask]:
    """Masks of matrices, by this process alone. ``shown``: with a progress bar."""
    for part in parts if selection == "off_principal" else ():
        check_entries_left(selection, part.matrix.numel(), part.k, part.name)
    with progress_bar(len(parts), "masks", "matrix", delay=BAR_DELAY, shown=shown) as bar:
        if selection == "principal":
            principal = [_principal_request(part) for part in parts]
            return principal_masks(principal, method=method, backend=backend, on_batch_done=bar.update)
        found = []
        for part in parts:
            found.append(_baseline_mask(part, selection, seed, method))
            bar.update(1)
    if callable(selection):  # Together, because each check would wait for the device.
        check_index_lists([m.indices for m in found], [p.matrix.numel() for p in parts], [p.name for p in parts])
    return found


def _cost(part: SelectionRequest, selection: str) -> float:
    """What a mask costs in comparison with others of the same selection."""
    if selection not in ("principal", "off_principal"):
        return float(part.matrix.numel())
    warm = selection == "principal" and part.kept.get("basis") is not None
    device = part.matrix.device.type
    return mask_cost(part.matrix.shape, part.rank, warm=warm, device=device)


def _label(selection: str | Callable[[Tensor, int], Tensor]) -> str:
    return selection if isinstance(selection, str) else getattr(selection, "__name__", "callable")


def check_selection(selection: str | Callable[[Tensor, int], Tensor]) -> None:
    """Raise ValueError unless `make_masks` knows this selection."""
    require(
        callable(selection) or selection in SELECTIONS,
        f"selection must be one of {', '.join(SELECTIONS)} or a callable, got {selection!r}",
    )


def check_entries_left(selection: str | Callable[[Tensor, int], Tensor], numel: int, k: int, name: str) -> None:
    """Raise ValueError, naming the parameter, if a selection cannot find k of ``numel`` entries."""
    require(
        selection != "off_principal" or 3 * k <= numel,
        f"{name}: selection='off_principal' leaves out the 2k largest weights, so it cannot choose k = {k} of {numel} "
        f"entries (density {k / numel:.3g}); lower density to at most 1/3, or budget_rank",
    )


def check_seed(seed: int) -> None:
    """Raise TypeError unless random masks can be drawn with this seed."""
    require(isinstance(seed, int) and not isinstance(seed, bool), f"seed must be an integer, got {seed!r}", TypeError)


def _principal_request(part: SelectionRequest) -> MaskRequest:
    # A basis narrower than a raised rank is of no use.
    useful = {key: t for key, t in part.kept.items() if key != "basis" or t.shape[1] >= part.rank}
    kept = {key: t.to(part.matrix.device) for key, t in useful.items()}
    return MaskRequest(part.matrix, part.rank, part.k, part.name, **kept)


def _baseline_mask(
    part: SelectionRequest, selection: str | Callable[[Tensor, int], Tensor], seed: int, method: str
) -> Mask:
    """A mask of any selection but the principal weights."""
    start = time.perf_counter()
    if selection == "off_principal":
        mask = off_principal_mask(part.matrix, part.rank, part.k, part.name, method)
    else:
        mask = Mask(_selected(part, selection, seed), method=_label(selection))
    return mask._replace(seconds=time.perf_counter() - start)


def _joined(masks: list[Mask], numel: int) -> Mask:
    """One mask of the masks of a batch of matrices with ``numel`` entries each."""
    if len(masks) == 1:
        return masks[0]
    return masks[0]._replace(
        indices=torch.cat([m.indices + i * numel for i, m in enumerate(masks)]),
        basis=_stacked([m.basis for m in masks]),
        threshold=_stacked([m.threshold for m in masks]),
        passes=max(m.passes for m in masks),
        converged=all(m.converged for m in masks),
        seconds=sum(m.seconds for m in masks),
    )


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    known = [t for t in tensors if t is not None]
    return torch.stack(known) if len(known) == len(tensors) else None


def warm_part(entry: dict[str, Any], p: Tensor, where: str | None) -> dict[str, Tensor]:
    """``basis`` and ``threshold`` of a mask or a saved state, moved to where they are kept.

    ``where`` is ``"device"`` (that of the parameter), ``"cpu"``, ``"pinned"`` (host memory from
    which copies to the device need not wait), or None to keep nothing.
    """
    if where is None:
        return {}
    target = p.device if where == "device" else torch.device("cpu")
    kept = {key: entry[key].to(target) for key in ("basis", "threshold") if entry.get(key) is not None}
    return {key: part.pin_memory() for key, part in kept.items()} if where == "pinned" and p.is_cuda else kept


def _selected(part: SelectionRequest, selection: str | Callable[..., Tensor], seed: int) -> Tensor:
    matrix, grad, k, name = part.matrix, part.grad, part.k, part.name
    check_finite(matrix, name)
    if selection == "random":
        return random_indices(matrix.numel(), k, seed + part.number, matrix.device)
    if selection == "magnitude":
        return largest_indices(matrix.abs(), k)
    if selection == "gradient":
        if grad is None:
            raise ValueError(
                f"{name}: selection='gradient' needs a dense gradient when a mask is made; call backward() first. A "
                "packed gradient will not do: keep the first masks by refresh_interval=None, or use lift_param_groups"
            )
        check_finite(grad, name, "gradients", "no mask can be made from them: leave this step out")
        return largest_indices(grad.abs(), k)
    assert callable(selection)
    numbered = getattr(selection, "numbered", False)
    indices = selection(matrix, k, number=part.number) if numbered else selection(matrix, k)
    check_index_form(indices, name, matrix.device)
    return indices.clone(memory_format=torch.contiguous_format)  # It may be a view of the list that it replaces.


@torch.no_grad()
def off_principal_mask(
    weight: Tensor, rank: int, k: int, name: str, method: str = "auto", memory_budget: int = MEMORY_BUDGET
) -> Mask:
    """The k entries of least |W_r| that are not among the 2k largest of |W|.

    The updates of reinforcement learning lie there. Ties go to the lower position, among the
    largest and among the chosen. Blocks of rows of W_r are computed one after the other, and the
    best entries of each go on to the next.

    Args:
        weight: (m, n), fp32, bf16 or fp16, with 3k <= m * n.
        rank, method: of `low_rank_factors`.
        name: of the weight, for messages.
        memory_budget: bytes for a row block of |W_r|, which has at least one row.

    Raises ValueError, naming ``name``, for a rank or a k out of range and for non-finite weights.
    """
    check_entries_left("off_principal", weight.numel(), k, name)
    factors = low_rank_factors(weight, rank, method=method, name=name)
    left_out = _among_largest(weight.abs().reshape(-1), 2 * k)
    (m, n), device = weight.shape, weight.device
    rows = max(1, memory_budget // (_BLOCK_BYTES * n))
    scores, kept = torch.empty(0, device=device), torch.empty(0, dtype=torch.int32, device=device)
    for start in range(0, m, rows):
        size = exact_product(factors.left[start : start + rows], factors.right.T).abs_().view(-1)
        first, last = start * n, start * n + size.numel()
        scores = torch.cat([scores, size.neg_().masked_fill_(left_out[first:last], -torch.inf)])
        kept = torch.cat([kept, torch.arange(first, last, dtype=torch.int32, device=device)])
        best = largest_indices(scores, min(k, scores.numel())).long()
        scores, kept = scores[best], kept[best]
    return Mask(kept, method="off_principal", passes=factors.passes, converged=factors.converged)


def largest_indices(values: Tensor, k: int) -> Tensor:
    """Flat, sorted int32 positions of the k largest entries of a tensor without NaN.

    Ties go to the lower position.
    """
    return _among_largest(values.reshape(-1), k).nonzero().flatten().int()


def _among_largest(flat: Tensor, k: int) -> Tensor:
    """Whether each entry is one of the k largest."""
    chosen = flat > (threshold := _kth_largest(flat, k))
    ties = (flat == threshold).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen


def random_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    """k distinct flat positions drawn uniformly, sorted int32.

    The same seed gives the same positions on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:k].sort().values.int().to(device)


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    place = flat.numel() - k
    if flat.device.type == "cpu":  # NumPy's introselect is ten times faster than torch.kthvalue.
        return torch.from_numpy(np.partition(flat.float().numpy(), place)[place : place + 1])[0]
    return torch.kthvalue(flat, place + 1).values
