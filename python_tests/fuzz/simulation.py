"""The textbook update in fp64, how near a result must be to it, and what a mask must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

EPS = 2.0**-24
"""Relative error of one fp32 operation."""


@dataclass
class Hyper:
    """Options of one update.

    ``factor`` multiplies gradients, up to a relative error ``factor_error``: clipping and
    GradScaler's scale.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool
    factor: float = 1.0
    factor_error: float = 0.0


@dataclass
class Entries:
    """Some entries: their weights (masters where there are some) and their moments."""

    w: Tensor
    m: Tensor
    v: Tensor


def adamw(
    before: Entries, g: Tensor, age: Tensor, h: Hyper, narrow: torch.finfo | None = None
) -> tuple[Entries, Entries]:
    """AdamW as in the paper, in fp64, and a bound of the error of the same in fp32.

    ``age`` counts updates, this one included. ``narrow`` is the dtype to which the product of
    gradient and factor is rounded, where it is.
    """
    (b1, b2), w, m, v = h.betas, before.w.double(), before.m.double(), before.v.double()
    g = g.double() * (-h.factor if h.maximize else h.factor)
    g_error = h.factor_error * g.abs() + (narrow.eps * (g.abs() + narrow.tiny) if narrow else 0.0)
    age = age.double()
    decayed = w * (1 - h.lr * h.weight_decay)
    m_new = b1 * m + (1 - b1) * g
    v_new = b2 * v + (1 - b2) * g * g
    size = h.lr / (1 - b1**age)
    update = size * m_new / ((v_new / (1 - b2**age)).sqrt() + h.eps)
    # A sum is as wrong as its parts: their sizes count, not that of the sum. fp32 has no smaller
    # squares than 1e-45.
    m_error = 6 * EPS * ((b1 * m).abs() + ((1 - b1) * g).abs()) + (1 - b1) * g_error + 1e-44
    v_error = 8 * EPS * v_new + (1 - b2) * g_error * (2 * g.abs() + g_error) + 1e-44
    least = ((v_new - v_error).clamp(min=0) / (1 - b2**age)).sqrt() + h.eps
    shift = size * (m_new.abs() + m_error) / least - update.abs() + 10 * EPS * update.abs()
    w_error = 3 * EPS * (w.abs() + decayed.abs() + update.abs()) + shift
    return Entries(decayed - update, m_new, v_new), Entries(w_error, m_error, v_error)


def check_rounded(stored: Tensor, truth: Tensor, bound: Tensor, label: str, stochastic: bool = False) -> None:
    """Assert that ``stored`` is a rounding of a number within ``bound`` of ``truth``."""
    low, high = (truth - bound).to(stored.dtype), (truth + bound).to(stored.dtype)
    if stored.dtype == torch.float64:
        low, high = truth - bound, truth + bound
    elif stored.dtype == torch.float32:
        low, high = _next(low, -1), _next(high, 1)
    elif stochastic:
        low, high = _down(truth - bound, stored.dtype), _up(truth + bound, stored.dtype)
    wrong = ~((stored >= low) & (stored <= high))
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} entries are wrong, the first at {i}: "
            f"{stored[i].item()!r}, expected {truth[i].item()!r} +- {bound[i].item():.3g}"
        )


def _next(x: Tensor, direction: int) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, direction * torch.inf))


def _down(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype)
    return torch.where(y.double() > x, _next(y, -1), y)


def _up(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype)
    return torch.where(y.double() < x, _next(y, 1), y)


def torch_step(before: Entries, g: Tensor, step: int, h: Hyper) -> Entries:
    """The same by torch's own AdamW, one operation after the other, in fp32."""
    w, m, v = (t.clone() for t in (before.w, before.m, before.v))
    torch_adamw(
        [w],
        [g.clone()],
        [m],
        [v],
        [],
        [torch.tensor(step - 1.0)],
        foreach=False,
        fused=False,
        amsgrad=False,
        maximize=h.maximize,
        beta1=h.betas[0],
        beta2=h.betas[1],
        lr=h.lr,
        eps=h.eps,
        weight_decay=h.weight_decay,
    )
    return Entries(w, m, v)


def promised_entries(shape: torch.Size, density: float, budget_rank: int | None) -> int:
    """k of each matrix (docs/guide.md)."""
    m, n = shape[-2:]
    return min((m + n) * budget_rank, m * n) if budget_rank is not None else max(1, round(density * m * n))


def check_mask(indices: Tensor, matrices: Tensor, k: int, label: str) -> None:
    """Assert that there are k sorted positions in each of the matrices (b, m, n)."""
    assert indices.dtype == torch.int32 and indices.dim() == 1, f"{label}: {indices.dtype} {indices.shape}"
    assert indices.numel() == k * len(matrices), f"{label}: {indices.numel()} entries, expected {k * len(matrices)}"
    assert bool((indices[1:] > indices[:-1]).all()), f"{label}: not sorted and unique"
    numel = matrices[0].numel()
    at = torch.arange(len(matrices)).repeat_interleave(k)
    assert torch.equal(indices.long() // numel, at), f"{label}: not {k} in each matrix"


def check_largest(indices: Tensor, magnitude: Tensor, k: int, label: str, slack: float = 0.0) -> None:
    """Assert that the positions hold the k largest magnitudes of each matrix (b, m, n)."""
    chosen = torch.zeros(magnitude.numel(), dtype=torch.bool)
    chosen[indices.long()] = True
    for i, (size, taken) in enumerate(zip(magnitude, chosen.view_as(magnitude))):
        near = slack * float(size.max())
        threshold = size.flatten().topk(k).values[-1]
        lost, extra = size[~taken], size[taken]
        assert bool((extra >= threshold - near).all()), f"{label}[{i}]: {float(extra.min())} is below {threshold}"
        assert bool((lost <= threshold + near).all()), f"{label}[{i}]: {float(lost.max())} is missing: {threshold}"
        if slack == 0.0:  # Ties go to the lower position.
            ties = (size == threshold).flatten().nonzero().flatten()
            kept = ties[taken.flatten()[ties]]
            assert torch.equal(kept, ties[: len(kept)]), f"{label}[{i}]: a tie went to a higher position"


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """|W_r| from fp64's SVD, and how far fp32 may be from it, in units of its largest entry."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    product = ((u[:, :rank] * s[:rank]) @ v[:rank]).abs()
    if rank >= len(s) or s[0] == 0:
        return product, 1e-6 * float(s[0] > 0)
    # Vectors turn into each other by the error of the Gram matrix over the gap of its eigenvalues.
    gap = float((s[rank - 1] ** 2 - s[rank] ** 2) / s[0] ** 2)
    return product, 1e-5 if gap > 0.5 else min(1e3, 1e-5 / max(gap, 1e-12))
