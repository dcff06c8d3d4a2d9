"""The methods of making masks that `bench_masks` compares, and their faithfulness."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lift_kernels.masks.lowrank import LowRankFactors, low_rank_factors
from lift_kernels.masks.principal import Mask, MaskRequest, principal_masks
from lift_kernels.masks.selection import largest_indices

DENSITY = 0.05
FULL_SVD, SVD_LOWRANK = "svd + topk (published)", "svd_lowrank(2r, 2) (published)"
SKLEARN = "scikit-learn's randomized_svd(2r, 2)"
TOPK, PARTITION = "Gram + eigh + topk", "Gram + eigh + numpy.partition"
SLOW = (FULL_SVD, SVD_LOWRANK, SKLEARN)
"""Methods that run in the first round only. They are far from the others in time or in quality."""
Method = Callable[[Sequence[Tensor], int], list[Mask]]  # weights, rank -> masks


class Truth(NamedTuple):
    """The exact mask, and the exact factors and best possible sum that judge others."""

    indices: Tensor
    left: Tensor
    right: Tensor
    best: float

    @staticmethod
    def of(weight: Tensor, rank: int, exact: LowRankFactors | None = None) -> Truth:
        """From ``exact`` factors of this rank or a higher one, or from new ones."""
        f = exact or low_rank_factors(weight, rank, method="gram")
        left, right = f.left[:, -rank:].contiguous(), f.right[:, -rank:].contiguous()  # singular values ascend
        magnitude = (left @ right.T).abs_()
        indices = largest_indices(magnitude, round(DENSITY * weight.numel()))
        return Truth(indices, left, right, float(magnitude.view(-1)[indices.long()].double().sum()))

    def judge(self, indices: Tensor) -> tuple[float, float]:
        """Overlap and captured magnitude."""
        rows, columns = indices.long() // len(self.right), indices.long() % len(self.right)
        caught = sum(
            float((self.left[r] * self.right[c]).sum(1).abs().double().sum())
            for r, c in zip(rows.split(2**18), columns.split(2**18))
        )
        same = len(np.intersect1d(indices.numpy(), self.indices.numpy(), assume_unique=True))
        return same / len(self.indices), caught / self.best


def list_problem(masks: Sequence[Mask], truths: Sequence[Truth]) -> str:
    """Why one of the masks is no sorted list of k distinct entries, or an empty string."""
    for mask, truth in zip(masks, truths):
        ascending = bool((mask.indices[1:] > mask.indices[:-1]).all())
        if len(mask.indices) != len(truth.indices) or not ascending:
            order = "sorted and distinct" if ascending else "not sorted and distinct"
            return f"{len(mask.indices)} entries of {len(truth.indices)}, {order}"
    return ""


def mean_overlap(truths: Sequence[Truth], masks: Sequence[Mask]) -> float:
    return float(np.mean([truth.judge(mask.indices)[0] for truth, mask in zip(truths, masks)]))


def exact_factors(weights: Sequence[Tensor], rank: int) -> list[LowRankFactors]:
    """Factors by Gram + eigh, which are exact to the index on trained matrices."""
    return [low_rank_factors(weight, rank, method="gram") for weight in weights]


def lift_masks(weights: Sequence[Tensor], rank: int, method: str, before: Sequence[Mask] | None = None) -> list[Mask]:
    """Masks of this package in one call, cold, or warm from those ``before``."""
    kept: list[dict] = [
        {} if b is None else {"basis": b.basis, "threshold": b.threshold} for b in before or [None] * len(weights)
    ]
    return principal_masks(
        [MaskRequest(w, rank, round(DENSITY * w.numel()), **k) for w, k in zip(weights, kept)], method=method
    )


def partitioned(weight: Tensor, left: Tensor, right: Tensor, passes: int) -> Mask:
    return Mask(largest_indices((left @ right.T).abs_(), round(DENSITY * weight.numel())), passes=passes)


def plain_gram(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors L, R of the rank-r approximation L R^T, in plain torch with its own threads."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    directions = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -rank:].contiguous()
    product = tall @ directions
    return (product, directions) if tall is weight else (directions, product)


def gram_and_partition(weight: Tensor, rank: int) -> Mask:
    """Gram + eigh, the product, numpy's introselect."""
    left, right = plain_gram(weight, rank)
    magnitude = (left @ right.T).abs_().view(-1).numpy()
    k = round(DENSITY * weight.numel())
    chosen = np.flatnonzero(magnitude >= np.partition(magnitude, len(magnitude) - k)[len(magnitude) - k])
    return Mask(torch.from_numpy(chosen[:k]).int(), passes=2)


def gram_and_topk(weight: Tensor, rank: int) -> Mask:
    return topk_mask(weight, *plain_gram(weight, rank))


def svd_and_topk(weight: Tensor, rank: int) -> Mask:
    """As the authors' code does it."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return topk_mask(weight, u[:, :rank] * s[:rank], vh[:rank].T.contiguous())


def topk_mask(weight: Tensor, left: Tensor, right: Tensor) -> Mask:
    flat = (left @ right.T).abs_().view(-1)
    return Mask(flat.topk(round(DENSITY * weight.numel())).indices.sort().values.int())


def svd_lowrank(weight: Tensor, rank: int, niter: int = 2) -> Mask:
    """The randomized variant of the authors' code."""
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=niter)
    return partitioned(weight, u[:, :rank] * s[:rank], v[:, :rank], 2 + 2 * niter)


def sklearn_svd(weight: Tensor, rank: int) -> Mask:
    """scikit-learn's randomized_svd, with directions and iterations of the authors' call.

    Its other parameters are scikit-learn's defaults.
    """
    from sklearn.utils.extmath import randomized_svd

    width = min(2 * rank, *weight.shape)
    u, s, vh = randomized_svd(weight.numpy(), rank, n_oversamples=width - rank, n_iter=2, random_state=0)
    left, right = (torch.from_numpy(np.ascontiguousarray(f)) for f in (u * s, vh.T))
    return partitioned(weight, left, right, 6)


def sklearn_problem() -> str:
    """Why `sklearn_svd` cannot run here, or an empty string."""
    try:
        importlib.import_module("sklearn.utils.extmath")
    except ImportError as error:
        return f"not installed ({error.name} is missing): pip install scikit-learn"
    return ""


def each(make: Callable[[Tensor, int], Mask]) -> Method:
    return lambda weights, rank: [make(weight, rank) for weight in weights]


def cold_methods(real: bool, last: bool, full_svd: bool, sklearn: bool) -> dict[str, Method]:
    """The cold methods by their names in the rows.

    The slow ones and the baseline run at the ``last`` rank only.
    ``real``: weights of a model, small matrices. ``full_svd``, ``sklearn``: whether these run.
    """
    ours: dict[str, Method] = {
        "chebyshev, cold": lambda weights, rank: lift_masks(weights, rank, "chebyshev"),
        "default, cold": lambda weights, rank: lift_masks(weights, rank, "auto"),
    }
    if not last:
        return ours
    others = {FULL_SVD: each(svd_and_topk)} if full_svd else {}
    others[SVD_LOWRANK] = each(svd_lowrank)
    if sklearn:
        others[SKLEARN] = each(sklearn_svd)
    return others | ({PARTITION: each(gram_and_partition)} if real else {TOPK: each(gram_and_topk)}) | ours
