"""Low-rank factors of a weight matrix: W_r = L R^T, the best rank-r approximation (paper section 3, Eckart-Young)."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_finite, require

METHODS = ("auto", "gram", "svd")


def low_rank_factors(weight: Tensor, rank: int, *, method: str = "auto", name: str = "weight") -> tuple[Tensor, Tensor]:
    """Factors ``L`` (m x r) and ``R`` (n x r), fp32, of the best rank-r approximation of ``weight`` (m x n).

    ``gram`` takes the top eigenvectors of the smaller Gram matrix, which is exact and several times faster than ``svd``; ``auto``
    is ``gram``. One factor is orthonormal, the other carries the singular values, so nothing is divided by a small one.

    Raises ValueError, naming ``name``, for a weight that is no matrix, a rank outside 1..min(m, n), an unknown method and
    non-finite entries.
    """
    require(weight.dim() == 2, f"{name}: a matrix is needed, got shape {tuple(weight.shape)}")
    check_rank(rank, weight.shape, name)
    require(method in METHODS, f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    check_finite(weight, name)
    matrix = weight.detach().float()
    if method == "svd":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank] * s[:rank], vh[:rank].T.contiguous()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    # A power of two keeps the squares in range and changes no digit; it never overflows itself.
    unit = torch.ldexp(torch.ones_like(wide[0, 0]), -torch.frexp(wide.abs().max()).exponent.clamp(-120, 120))
    unit_wide = wide * unit
    _, vectors = torch.linalg.eigh(unit_wide @ unit_wide.T)  # ascending eigenvalues
    basis = vectors[:, -rank:].contiguous()
    scaled = wide.T @ basis
    return (basis, scaled) if wide is matrix else (scaled, basis)


def check_rank(rank: int, shape: torch.Size, name: str) -> None:
    """Raise ValueError unless 1 <= rank <= min(shape)."""
    small = min(shape)
    require(isinstance(rank, int) and 1 <= rank <= small,
            f"{name}: rank must be an integer from 1 to the smaller side, {small}, got {rank!r}")  # fmt: skip
