"""How many entries of a matrix are trained, and the rank of the approximation that selects them."""

from __future__ import annotations

import torch

from ..validation import MAX_ENTRIES

DEFAULT_RANK = 64


def entry_count(
    shape: torch.Size,
    *,
    k: int | None = None,
    density: float | None = None,
    budget_rank: int | None = None,
    name: str = "weight",
) -> int:
    """How many entries of an m x n matrix are trained, from exactly one of three settings.

    Args:
        shape: (m, n), with m * n < 2^31.
        k: the number itself.
        density: a share of the matrix, in (0, 1]: k = round(density * m * n).
        budget_rank: k = (m + n) * budget_rank, at most m * n (paper section 3).
        name: of the parameter, for messages.

    Raises ValueError, naming the parameter and the value, for a setting out of range.
    """
    settings = {"k": k, "density": density, "budget_rank": budget_rank}
    given = [label for label, value in settings.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"{name}: give exactly one of k, density and budget_rank, got {found}")
    m, n = shape
    if m * n > MAX_ENTRIES:
        raise ValueError(f"{name}: a matrix may have up to 2^31-1 entries, got {m} x {n}")
    if budget_rank is not None:
        if not isinstance(budget_rank, int) or budget_rank < 1:
            raise ValueError(f"{name}: budget_rank must be an integer of at least 1, got {budget_rank!r}")
        return min((m + n) * budget_rank, m * n)
    if density is not None:
        if not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
            raise ValueError(f"{name}: density must be in (0, 1], got {density!r}")
        return max(1, round(density * m * n))
    assert k is not None
    if not isinstance(k, int) or not 1 <= k <= m * n:
        raise ValueError(f"{name}: k must be an integer from 1 to {m * n}, got {k!r}")
    return k


def check_rank(rank: int, shape: torch.Size, name: str) -> None:
    """Raise ValueError unless 1 <= rank <= min(shape)."""
    small = min(shape)
    if not (isinstance(rank, int) and 1 <= rank <= small):
        raise ValueError(f"{name}: rank must be an integer from 1 to the smaller side, {small}, got {rank!r}")


def mask_rank(shape: torch.Size, rank: int | None, name: str) -> int:
    """The LRA rank of a matrix, or of each matrix of a batch: ``rank``, or 64 where it is None.

    It is at most the smaller side, so one rank serves all layers of a model. There the
    approximation is the matrix itself.

    Raises ValueError, naming the parameter and the value, for a rank below 1.
    """
    rank = DEFAULT_RANK if rank is None else rank
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name}: rank must be an integer of at least 1 or None, got {rank!r}")
    return min(rank, *shape[-2:])


def trained_entries(shape: torch.Size, density: float, budget_rank: int | None, name: str) -> int:
    """k of a matrix, or of each matrix of a batch. ``budget_rank`` takes precedence."""
    if density is None and budget_rank is None:
        raise ValueError(f"{name}: density must be in (0, 1], got None; give it, or budget_rank")
    share = density if budget_rank is None else None
    return entry_count(shape[-2:], density=share, budget_rank=budget_rank, name=name)
