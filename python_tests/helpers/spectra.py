"""Matrices of known spectrum, and checks of masks of principal weights."""

from __future__ import annotations

import torch


def with_spectrum(m: int, n: int, values: list[float], seed: int = 0) -> torch.Tensor:
    """An fp32 matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(d, len(values), generator=generator, dtype=torch.float64))[0] for d in (m, n)
    )
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).float()


def slow_spectrum(m: int, n: int, seed: int = 0, decay: float = 0.15) -> torch.Tensor:
    """A matrix with singular values i^-decay, as flat around the rank as in trained weights."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, min(m, n), generator=generator)).Q for size in (m, n))
    return (u * torch.arange(1, min(m, n) + 1).float() ** -decay) @ v.T


def truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The best rank-r approximation, in fp64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def whole_factors(m, n, rank, seed=0, top=3):
    """Factors of small whole numbers.

    Products are exact and ties are frequent, so every backend must return the same positions.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-top, top + 1, (size, rank), generator=generator).float() for size in (m, n))


def assert_principal(indices: torch.Tensor, weight: torch.Tensor, rank: int, k: int) -> None:
    """Check for the k largest |W_r| of the fp64 SVD.

    Entries that fp32 cannot tell from the k-th may differ.
    """
    assert_index_list(indices, k, weight.numel())
    magnitude = truncated(weight, rank).abs().flatten()
    expected = stable_top(magnitude, k)
    threshold = magnitude[expected.long()].min()
    differ = torch.cat([indices, expected]).unique(return_counts=True)
    doubtful = magnitude[differ[0][differ[1] == 1].long()]
    assert bool(((doubtful - threshold).abs() <= 4e-6 * magnitude.max()).all()), "another entry was chosen"


def stable_top(magnitude: torch.Tensor, k: int) -> torch.Tensor:
    """Sorted positions of the k largest entries.

    The descending sort is stable, so ties go to the lower position.
    """
    return magnitude.flatten().argsort(descending=True, stable=True)[:k].sort().values.int()


def assert_index_list(indices: torch.Tensor, k: int, numel: int) -> None:
    assert indices.dtype == torch.int32 and indices.shape == (k,)
    assert bool((indices[1:] > indices[:-1]).all()), "not sorted, or an index twice"
    assert k == 0 or (indices[0] >= 0 and indices[-1] < numel)
