"""Rows of the selection alone, and of ``principal_indices`` of single matrices.

Both are timed in turns. The selection starts from factors. ``lowrank_topk`` recomputes their
product. It is compared with the product alone (`torch.mm` into memory that is there), with
selections from a materialized |W_r|, and with product, abs and torch.topk together, which is what
it replaces. ``times_topk``, ``times_product`` and ``times_product_topk`` are medians of the ratios
of these to a row within a round.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.common import results, timing
from bench.common.mask_methods import DENSITY, TOPK, Truth, gram_and_topk
from bench.common.matrices import slow_spectrum
from bench.common.timing import Candidate
from lift_kernels import ops, principal_indices
from lift_kernels.masks.lowrank import low_rank_factors
from lift_kernels.masks.selection import largest_indices

RANK = 64
ALONE = ["64x64", "128x128", "256x256", "512x512", "1024x1024", "2048x2048", "1536x576"]
OVERLAP = 0.9
"""Overlap with the exact mask below which ``principal_indices`` is wrong."""

TOPK_ALONE, PRODUCT, TOGETHER = "torch.topk of |W_r|", "the product alone", "the product, abs, torch.topk"
COLUMNS = {"times_topk": TOPK_ALONE, "times_product": PRODUCT, "times_product_topk": TOGETHER}


def compare(name: str, weight: Tensor, rank: int, flops: float, runs: int) -> list[dict]:
    """One row per way to select. ``flops``: the machine's rate, for the roofline."""
    f = low_rank_factors(weight, rank, method="chebyshev")
    k = round(DENSITY * weight.numel())
    magnitude = (f.left @ f.right.T).abs_()
    flat, out = magnitude.view(-1), torch.empty_like(magnitude)
    chosen, threshold = ops.lowrank_topk(f.left, f.right, k)
    bracket = torch.stack([threshold * 0.98, threshold * 1.02])
    candidates = [
        Candidate(TOPK_ALONE, lambda: flat.topk(k)),
        Candidate("torch.kthvalue of |W_r|", lambda: flat.kthvalue(flat.numel() - k + 1)),
        Candidate("numpy.partition of |W_r|", lambda: np.partition(flat.numpy(), flat.numel() - k)),
        Candidate(PRODUCT, lambda: torch.mm(f.left, f.right.T, out=out)),
        Candidate(TOGETHER, lambda: torch.mm(f.left, f.right.T, out=out).abs_().view(-1).topk(k)),
        Candidate("lowrank_topk, cold", lambda: ops.lowrank_topk(f.left, f.right, k)),
        Candidate("lowrank_topk, warm bracket", lambda: ops.lowrank_topk(f.left, f.right, k, bracket=bracket)),
    ]
    labels = {"op": "lowrank_topk", "set": name, "rank": rank}
    rows: list[dict] = []
    if status := problem(chosen, magnitude, k):
        refused = [c for c in candidates if c.name.startswith("lowrank_topk")]
        rows += [labels | {"variant": c.name, "status": status} for c in refused]
        candidates = [c for c in candidates if c not in refused]
    times = timing.time_interleaved(candidates, runs, warmup=1)
    rows += [labels | row(c.name, times, 2 * weight.numel() * rank / flops) for c in candidates]
    results.show(rows, ["set", "rank", "variant", "seconds", *COLUMNS, "floor_s", "share_of_floor", "status"])
    return rows


def problem(chosen: Tensor, magnitude: Tensor, k: int) -> str:
    """The status of a wrong selection, or an empty string."""
    same = len(np.intersect1d(chosen.numpy(), largest_indices(magnitude, k).numpy())) / k
    if same >= 0.9999:
        return ""
    return f"refused, it is wrong: it shares only {same:.5f} of the indices with numpy.partition"


def row(name: str, times: dict[str, np.ndarray], roofline: float) -> dict:
    """The columns of a timed selection."""
    seconds = np.median(times[name])
    ratios = {key: float(f"{np.median(times[other] / times[name]):.3g}") for key, other in COLUMNS.items()}
    return ratios | {
        "variant": name,
        "seconds": float(f"{seconds:.4g}"),
        "runs": len(times[name]),
        "floor_s": float(f"{roofline:.3g}"),
        "share_of_floor": float(f"{roofline / seconds:.3g}") if "lowrank" in name else "",
        "status": "ok",
    }


def alone(m: int, n: int) -> list[dict]:
    """Rows of one matrix of a slow spectrum: Gram + eigh + topk, and ``principal_indices``."""
    weight, rank = slow_spectrum(m, n), min(RANK, m, n)
    truth = Truth.of(weight, rank)
    candidates = [
        Candidate(TOPK, lambda: gram_and_topk(weight, rank).indices),
        Candidate("principal_indices", lambda: principal_indices(weight, rank, density=DENSITY)),
    ]
    quality = [truth.judge(candidate.run()) for candidate in candidates]  # type: ignore[arg-type]
    times = timing.time_interleaved(candidates, max(5, min(30, 2**24 // (m * n))), warmup=1)
    labels = {"op": "principal_indices", "set": f"{m}x{n}", "rank": rank, "matrices": 1}
    rows = [
        labels | alone_row(candidate.name, times, overlap, captured)
        for candidate, (overlap, captured) in zip(candidates, quality)
    ]
    results.show(rows, ["set", "rank", "variant", "seconds", "ratio", "overlap_mean", "captured_mean", "status"])
    return rows


def alone_row(name: str, times: dict[str, np.ndarray], overlap: float, captured: float) -> dict:
    """The columns of one way to make the mask of a matrix. A wrong mask has no time."""
    said = {"variant": name, "overlap_mean": round(overlap, 4), "captured_mean": round(captured, 5)}
    said |= {"overlap_min": said["overlap_mean"], "captured_min": said["captured_mean"]}
    if overlap < OVERLAP:
        words = f"refused, it is wrong: an overlap of {overlap:.3f}, at least {OVERLAP} is expected"
        return said | {"status": words}
    return said | {
        "seconds": float(f"{np.median(times[name]):.4g}"),
        "runs": len(times[name]),
        "ratio": float(f"{np.median(times[TOPK] / times[name]):.4g}"),
        "baseline": TOPK,
        "status": "ok",
    }
