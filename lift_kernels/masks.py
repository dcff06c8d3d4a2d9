"""From low-rank factors to a sorted index list: the k entries of largest |W_r|."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import MAX_ENTRIES, require
from .lowrank import low_rank_factors


def principal_indices(
    weight: Tensor,
    rank: int,
    k: int | None = None,
    density: float | None = None,
    budget_rank: int | None = None,
    *,
    method: str = "auto",
    name: str = "weight",
) -> Tensor:
    """The principal weights of a matrix (m x n): flat, sorted int32 positions of the k largest |W_r| (paper section 3).

    Exactly one of ``k``, ``density`` (k = round(density * m * n)) and ``budget_rank`` (k = (m + n) * budget_rank, at most m * n)
    says how many; ties go to the lower position. The weight itself is not changed.

    Raises ValueError, naming ``name``, for a rank or a k out of range and for non-finite weights.
    """
    require(weight.dim() == 2, f"{name}: a matrix is needed, got shape {tuple(weight.shape)}")
    k = entry_count(weight.shape, k=k, density=density, budget_rank=budget_rank, name=name)
    left, right = low_rank_factors(weight, rank, method=method, name=name)
    return largest_indices((left @ right.T).abs_(), k)


def entry_count(
    shape: torch.Size,
    *,
    k: int | None = None,
    density: float | None = None,
    budget_rank: int | None = None,
    name: str = "weight",
) -> int:
    """How many entries of an m x n matrix are trained, from exactly one of the three ways to say it."""
    given = [label for label, value in (("k", k), ("density", density), ("budget_rank", budget_rank)) if value is not None]
    require(len(given) == 1, f"{name}: give exactly one of k, density and budget_rank, got {' and '.join(given) or 'none'}")
    m, n = shape
    require(m * n <= MAX_ENTRIES, f"{name}: a matrix may have up to 2^31-1 entries, got {m} x {n}")
    if budget_rank is not None:
        require(isinstance(budget_rank, int) and budget_rank >= 1,
                f"{name}: budget_rank must be an integer of at least 1, got {budget_rank!r}")  # fmt: skip
        return min((m + n) * budget_rank, m * n)
    if density is not None:
        require(0.0 < density <= 1.0, f"{name}: density must be in (0, 1], got {density}")
        return max(1, round(density * m * n))
    assert k is not None
    require(isinstance(k, int) and 1 <= k <= m * n, f"{name}: k must be an integer from 1 to {m * n}, got {k!r}")
    return k


def largest_indices(magnitude: Tensor, k: int) -> Tensor:
    """Flat, sorted int32 positions of the k largest entries of a non-negative tensor; ties go to the lower position."""
    flat = magnitude.reshape(-1)
    chosen = flat > (threshold := _kth_largest(flat, k))
    ties = (flat == threshold).nonzero().flatten()
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero().flatten().int()


def random_indices(numel: int, k: int, seed: int, device: torch.device) -> Tensor:
    """k distinct flat positions drawn uniformly, sorted int32; the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:k].sort().values.int().to(device)


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    place = flat.numel() - k
    if flat.device.type == "cpu":  # numpy's introselect is ten times faster than torch.kthvalue
        return torch.from_numpy(np.partition(flat.numpy(), place)[place : place + 1])[0]
    return torch.kthvalue(flat, place + 1).values
