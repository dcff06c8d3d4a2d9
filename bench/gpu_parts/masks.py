"""Masks: the selection against torch.topk, and refreshes of all matrices, cold and warm.

Selection (`lowrank_topk`). Roofline: FLOPs of the product of the factors at the TF32 rate. Bytes:
factors read, bitmap written and read, list written. torch's methods: topk of a |W_r| that lies in
memory, and of one that is formed first. Checked: there are k distinct sorted positions, none is
smaller in fp64 than any that was left out (1e-4), and the threshold is the smallest of them.
Factors take turns.

Refresh (`principal_masks`, Chebyshev iteration, r = 128, weights with a slowly decaying spectrum).
Roofline: 2 m n l FLOPs a pass and 2 m n r for the selection at the bf16 rate, the dtype of the
weights, or one read of the weights a pass. ``eigh_share`` and ``orth_share``: the time between
events around the eigenproblems, and around the ops that orthonormalize, over that of the refreshes.
Checked: the overlap of the first matrix's mask with the reference's exact one is above 0.9.
Refreshes wait for the card, and touch gigabytes. So they are timed from one synchronization to the
next. One layer comes first: its time says how many layers fit into the stage's budget.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.gpu_parts.models import BF16, DENSITY, LLAMA_2_7B, LLAMA_3_8B, Model
from bench.gpu_parts.runner import Run
from lift_kernels import ops
from lift_kernels.masks import chebyshev
from lift_kernels.masks.costs import block_width
from lift_kernels.masks.principal import Mask, MaskRequest, principal_masks

RANK = 128


def rank_of(model: Model) -> int:
    return min(RANK, min(map(min, model.layer)) // 4)


def selection_problem(left: Tensor, right: Tensor, k: int, found: tuple[Tensor, Tensor]) -> str:
    """What is wrong with indices and threshold, or an empty string."""
    indices, threshold = found[0].long(), float(found[1])
    if indices.numel() != k or not bool((indices[1:] > indices[:-1]).all()):
        return f"{indices.numel()} positions, not {k} ascending ones"
    magnitude = (left.double() @ right.double().T).abs_().view(-1)
    low = float(magnitude[indices].min())
    magnitude[indices] = 0.0
    high = float(magnitude.max())
    if not low >= high * (1 - 1e-4):
        return f"an entry of {low:.5g} was chosen, one of {high:.5g} was not"
    return (
        ""
        if abs(threshold - low) <= 1e-4 * low
        else f"the threshold is {threshold:.5g}, the smallest chosen entry {low:.5g}"
    )


def selection(run: Run) -> None:
    for model in (LLAMA_2_7B, LLAMA_3_8B):
        model = model.on(run.device)
        (m, n), rank = model.layer[-1], rank_of(model)
        k, generator = round(DENSITY * m * n), torch.Generator(run.device).manual_seed(0)
        count = run.sets(4.0 * (m + n) * rank)
        factors = [
            [torch.randn(side, rank, generator=generator, device=run.device) for side in (m, n)] for _ in range(count)
        ]
        labels = {
            "op": "lowrank_topk",
            "model": model.name,
            "dtype": "fp32",
            "shape": f"{m} x {n}, r = {rank}, k = {k}",
        }
        work = {"flops": 2.0 * m * n * rank, "rate": "tf32", "moved": 4.0 * (m + n) * rank + m * n / 4 + 4.0 * k}

        def formed(left: Tensor, right: Tensor, k=k) -> Tensor:
            return (left @ right.T).abs_().view(-1).topk(k, sorted=False).indices

        baseline = run.time("product, abs, torch.topk", [partial(formed, *pair) for pair in factors], **labels)
        magnitudes = [(left @ right.T).abs_().view(-1) for left, right in factors[: run.sets(4.0 * m * n)]]
        alone = [partial(torch.topk, magnitude, k, sorted=False) for magnitude in magnitudes]
        run.time("torch.topk of |W_r| in memory", alone, moved=4.0 * m * n, **labels)
        del magnitudes, alone
        against = None if baseline is None else ("product, abs, torch.topk", baseline)
        brackets: dict[str, list] = {"drawn bracket": [partial(ops.lowrank_topk, *pair, k) for pair in factors]}
        thresholds = [ops.lowrank_topk(*pair, k)[1] for pair in factors]
        brackets["known bracket"] = [
            partial(ops.lowrank_topk, *pair, k, bracket=torch.stack([t * 0.98, t * 1.02]))
            for pair, t in zip(factors, thresholds)
        ]
        for name, calls in brackets.items():
            problem = run.problem(lambda call=calls[0], pair=factors[0], k=k: selection_problem(*pair, k, call()))
            run.time(name, calls, problem=problem, against=against, waits=True, **work, **labels)
        run.free()


def slow_spectrum(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """A bf16 matrix whose singular values decay as i^-0.15 for 2 r directions, over noise."""
    device = generator.device
    u, v = (torch.randn(side, 2 * rank, generator=generator, device=device) for side in (m, n))
    decay = torch.arange(1, 2 * rank + 1, device=device).float() ** -0.15
    noise = torch.randn(m, n, generator=generator, device=device).mul_(0.02)
    return noise.add_((u * decay) @ v.T, alpha=0.1 / min(m, n) ** 0.5).to(BF16)


SPANS = [
    (chebyshev, "symmetric_eigen", "eigh_share"),
    (torch.linalg, "qr", "orth_share"),
    (ops, "cholesky_qr_", "orth_share"),
    (ops, "chebyshev_step_", "orth_share"),
]


@contextmanager
def spans(run: Run) -> Iterator[dict[str, list]]:
    """Enclose calls of the functions in `SPANS` by events. Yields pairs by column."""
    found: dict[str, list] = {column: [] for _, _, column in SPANS}
    originals = [getattr(module, name) for module, name, _ in SPANS]

    def stamp():
        if run.dry:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enclosed(original, column: str):
        def call(*arguments, **options):
            before = stamp()
            result = original(*arguments, **options)
            found[column].append((before, stamp()))
            return result

        return call

    try:
        for (module, name, column), original in zip(SPANS, originals):
            setattr(module, name, enclosed(original, column))
        yield found
    finally:
        for (module, name, _), original in zip(SPANS, originals):
            setattr(module, name, original)


def refreshed(run: Run, requests: list[MaskRequest], repeats: int) -> tuple[list[Mask], list[float], dict[str, float]]:
    """Masks, and the seconds of each of ``repeats`` refreshes.

    Also the shares that eigenproblems and orthonormalization took of all.
    """
    taken = []
    with spans(run) as found:
        for _ in range(repeats):
            if not run.dry:
                torch.cuda.synchronize()
            start = time.perf_counter()
            masks = principal_masks(requests, method="chebyshev")
            if not run.dry:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    inside = {
        column: sum((b - a) if run.dry else a.elapsed_time(b) / 1e3 for a, b in pairs)
        for column, pairs in found.items()
    }
    return masks, taken, {column: round(seconds / sum(taken), 4) for column, seconds in inside.items()}


def overlap_problem(mask: Mask, exact: Tensor) -> str:
    overlap = float(torch.isin(mask.indices, exact).double().mean())
    if len(mask.indices) != len(exact):
        return f"a mask has {len(mask.indices)} entries, not {len(exact)}"
    return "" if overlap > 0.9 else f"only {overlap:.3f} of a mask is in the exact one"


def refresh_rows(run: Run, model: Model, weights: list[Tensor], exact: Tensor, repeats: int) -> float:
    """Rows of a cold and a warm refresh. Returns the seconds of one of each together.

    ``exact``: the first mask.
    """
    rank, layers, total = rank_of(model), len(weights) // len(model.layer), 0.0
    requests = [MaskRequest(w, rank, round(DENSITY * w.numel())) for w in weights]
    for name in ("cold", "warm"):
        masks, taken, labels = refreshed(run, requests, repeats)
        problem = run.problem(lambda masks=masks: overlap_problem(masks[0], exact))
        labels |= {
            "passes": round(sum(m.passes for m in masks) / len(masks), 2),
            "settled": sum(m.converged for m in masks),
        }
        run.time(
            f"{name}, "
            f"{'one layer' if layers == 1 else 'all matrices' if layers == model.layers else f'{layers} layers'}",
            measured=taken,
            problem=problem,
            rate="bf16",
            op="principal_masks",
            model=model.name,
            dtype="bf16",
            flops=sum(
                2.0 * w.numel() * (m.passes * block_width(w.shape, rank, warm=m.method == "warm") + rank)
                for w, m in zip(weights, masks)
            ),
            moved=float(sum(m.passes * w.nbytes for w, m in zip(weights, masks))),
            shape=f"{len(weights)} matrices, r = {rank}",
            **labels,
        )
        total += min(taken)
        requests = [replace(r, basis=mask.basis, threshold=mask.threshold) for r, mask in zip(requests, masks)]
    return total


def refresh(run: Run) -> None:
    model = LLAMA_2_7B.on(run.device)
    generator, rank = torch.Generator(run.device).manual_seed(0), rank_of(model)
    weights = [slow_spectrum(m, n, rank, generator) for m, n in model.layer]
    first = MaskRequest(weights[0], rank, round(DENSITY * weights[0].numel()))
    exact = principal_masks([first], method="gram", backend="reference")[0].indices
    compiling = [replace(first, weight=w, k=round(DENSITY * w.numel())) for w in weights]
    principal_masks(compiling, method="chebyshev")
    one = refresh_rows(run, model, weights, exact, 3)
    layers = model.layers if run.dry else min(model.layers, int((run.left() - 8) / one))
    if layers > 1:
        weights += [slow_spectrum(m, n, rank, generator) for m, n in model.layer * (layers - 1)]
        refresh_rows(run, model, weights, exact, 1)
    if layers < model.layers:
        expected = f"{model.layers * one:.0f} s were expected from one layer's {one:.2f} s"
        run.add(
            "all matrices",
            op="principal_masks",
            model=model.name,
            status=f"not run: {expected}, {run.left():.0f} s are left",
        )
