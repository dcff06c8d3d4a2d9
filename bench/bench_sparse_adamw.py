"""Times `sparse_adamw_` on the CPU, all matrices in one call, against torch.optim.AdamW(fused=True)
on the same tensors.

Shape sets: the 210 linear matrices of SmolLM2-135M (or of ``--model``) with their real masks (exact
top 5 % of |W_r|, r = 64), and one 4096 x 4096 and one 4096 x 11008 matrix with a random mask
clustered by rows. All contestants of a shape set and dtype share weights and dense gradients and
are timed in turns. Peers: torch's fused, foreach and for-loop AdamW, whose moments have the
weight's dtype, and a plain rewrite of the published LIFT step. Rows with ``+ refresh/100`` add a
hundredth of a refresh of all masks, as LiftAdamW makes it from the bases of the last one,
``+ cold refresh/100`` one without them.

Every variant is first checked against `lift_kernels.ops.reference`; a wrong one has a row without a
time, and the exit status is 1.

Bytes of the floor, per step. Sparse: each distinct 64-byte line that selected entries lie on,
weights read and written, dense gradients read; per entry 4 (index) + 2 moments read and written + 8
(master read and written) + a packed gradient. A weight that has a master is only written, but its
lines must be read too, since they are written in part. Dense: weight and moments read and written,
gradient read. The floor is these bytes over the measured copy bandwidth.

    python bench/bench_sparse_adamw.py [--model DIR] [--runs 20] [--sets smollm2 4096x4096
    4096x11008] [--out DIR] [--dry-run]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import bench_util
import numpy as np
import torch
from bench_arena import Arena, clustered_indices
from bench_util import Contestant
from torch import Tensor

from bench import plots
from lift_kernels import ops
from lift_kernels.masks.principal import MaskRequest, principal_masks
from lift_kernels.ops import dispatch

HYPER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
FP32, BF16 = torch.float32, torch.bfloat16
DENSITY, RANK = 0.05, 64
COLUMNS = ["set", "variant", "median_ms", "q25_ms", "q75_ms", "ratio", "floor_ms", "share_of_floor", "status"]


def model_weights(name: str | None) -> list[Tensor]:
    """The fp32 weights of a model's linear layers, embeddings and head left out."""
    from lift_kernels.finetune import model_io
    from lift_kernels.nn.param_groups import lift_param_groups

    model, _ = model_io.load_model(model_io.find_model(name), FP32)
    return [weight.detach() for _, weight in lift_param_groups(model)[0]["params"]]


class Sparse:
    """`sparse_adamw_` on all matrices, ten steps into their training."""

    def __init__(self, weights, grads, arena: Arena, moment=FP32, master=False, packed=False, stochastic=False):
        self.weights, self.arena, self.packed, self.stochastic = weights, arena, packed, stochastic
        flat = [index.long() for index in arena.lists()]
        self.grads = [g.view(-1)[i] for g, i in zip(grads, flat)] if packed else grads
        self.exp_avg, self.exp_avg_sq = arena.zeros(moment), arena.zeros(moment)
        self.master = arena.zeros(FP32) if master else None
        if master:
            for weight, offset, index in zip(weights, arena.offsets, flat):
                self.master[offset : offset + len(index)] = weight.view(-1)[index].float()
        self.steps = torch.full((len(weights),), 10.0, device=arena.indices.device)

    @torch.no_grad()  # as in the step of any optimizer
    def __call__(self, backend: str | None = None) -> None:
        arena = self.arena
        ops.sparse_adamw_(
            self.weights,
            self.grads,
            arena.indices,
            arena.offsets,
            arena.counts,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            master=self.master,
            packed_grads=self.packed,
            stochastic=self.stochastic,
            seed=1,
            backend=backend,
            **HYPER,
        )

    def floor_bytes(self) -> float:
        """As the module's docstring counts them."""
        lines = self.arena.line_bytes(self.weights[0].element_size()) * 2
        stream = 4 + 4 * self.exp_avg.element_size() + (8 if self.master is not None else 0)
        if self.packed:
            stream += self.grads[0].element_size()
        else:
            lines += self.arena.line_bytes(self.grads[0].element_size())
        return lines + self.arena.entries * stream

    def check(self) -> str:
        """What is wrong with two steps, or an empty string; whole weights are compared. Leaves all
        as it was.
        """
        state = [*self.weights, self.exp_avg, self.exp_avg_sq, *([] if self.master is None else [self.master])]
        saved = [tensor.clone() for tensor in state]
        results = []
        for backend in ("reference", None):
            for _ in range(2):
                self(backend)
            results.append([tensor.clone() for tensor in state])
            for tensor, old in zip(state, saved):
                tensor.copy_(old)
        return bench_util.difference(*results)


class Published:
    """The published step, rewritten: a dense bool mask per parameter, boolean indexing, a dense
    update, a Python loop.
    """

    def __init__(self, weights: list[Tensor], grads: list[Tensor], arena: Arena):
        self.weights, self.grads, self.step = weights, grads, 10
        self.masks, self.exp_avg, self.exp_avg_sq = [], [], []
        for weight, index in zip(weights, arena.lists()):
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
            mask[index.long()] = True
            self.masks.append(mask.view_as(weight))
            self.exp_avg.append(torch.zeros(len(index), dtype=weight.dtype, device=weight.device))
            self.exp_avg_sq.append(torch.zeros(len(index), dtype=weight.dtype, device=weight.device))

    @torch.no_grad()
    def __call__(self) -> None:
        beta1, beta2 = HYPER["betas"]
        self.step += 1
        size = HYPER["lr"] * (1 - beta2**self.step) ** 0.5 / (1 - beta1**self.step)
        for weight, grad, mask, m, v in zip(self.weights, self.grads, self.masks, self.exp_avg, self.exp_avg_sq):
            g = grad[mask]
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = torch.zeros_like(weight)
            update[mask] = m / v.sqrt().add_(HYPER["eps"])
            weight.add_(update, alpha=-size)


def dense(weights: list[Tensor], grads: list[Tensor], **flags: bool) -> Callable[[], None]:
    """The step of torch's AdamW over Parameters that share the weights."""
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad
    return torch.optim.AdamW(parameters, **HYPER, **flags).step


def sparse_name(packed: bool, label: str) -> str:
    return f"{'packed' if packed else 'dense'} grads{label}"


def contestants(
    weights: list[Tensor], arena: Arena, dtype: torch.dtype, context: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """The baseline first; and what is wrong with the sparse ones that are not among them, which are
    checked here.
    """
    weights = [weight.to(dtype, copy=True) for weight in weights]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(w.shape, generator=generator).mul_(1e-3).to(dtype) for w in weights]
    if dtype == FP32:
        kinds = {"": {}}
    else:
        kinds = {
            ", bf16 moments": {"moment": BF16},
            ", bf16 moments, fp32 master": {"moment": BF16, "master": True},
            ", fp32 moments, fp32 master": {"master": True},
            ", bf16 moments, stochastic": {"moment": BF16, "stochastic": True},
        }
    numel = sum(w.numel() for w in weights)
    wrong: dict[str, str] = {}
    result = [Contestant("AdamW fused", dense(weights, grads, fused=True), 7.0 * numel * dtype.itemsize)]
    for packed in (False, True):
        for label, options in kinds.items():
            sparse = Sparse(weights, grads, arena, packed=packed, **options)
            if problem := sparse.check():
                wrong[sparse_name(packed, label)] = f"refused, it is wrong: {problem}"
                continue
            result.append(Contestant(sparse_name(packed, label), sparse, sparse.floor_bytes()))
    if context:
        result.append(Contestant("AdamW for-loop", dense(weights, grads, foreach=False, fused=False)))
        result.append(Contestant("AdamW foreach", dense(weights, grads, foreach=True)))
        result.append(Contestant("published LIFT step", Published(weights, grads, arena)))
    return result, wrong


def refresh_seconds(weights: list[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """Index lists, and the seconds of a cold refresh of all masks and of one from the bases of the
    last; medians of three.
    """
    cold = [MaskRequest(w, min(RANK, *w.shape), round(DENSITY * w.numel())) for w in weights]
    masks = principal_masks(cold)  # the first touch of new memory is not timed
    warm = [replace(r, basis=m.basis, threshold=m.threshold) for r, m in zip(cold, masks)]
    taken: dict[str, list[float]] = {"cold refresh": [], "refresh": []}
    for _ in range(3):
        for name, requests in (("cold refresh", cold), ("refresh", warm)):
            start = time.perf_counter()
            principal_masks(requests)
            taken[name].append(time.perf_counter() - start)
    return [m.indices for m in masks], {name: float(np.median(values)) for name, values in taken.items()}


def shape_set(name: str, model: str | None) -> tuple[list[Tensor], list[Tensor], dict[str, float], str]:
    """Weights, index lists, seconds of refreshes (none without real masks), description of the
    masks.
    """
    if name == "smollm2":
        weights = model_weights(model)
        lists, refreshes = refresh_seconds(weights)
        return weights, lists, refreshes, f"top 5 % of |W_r|, r = {RANK}"
    if name == "dry":
        weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((96, 64), (40, 80))]
        lists, refreshes = refresh_seconds(weights)
        return weights, lists, refreshes, f"top 5 % of |W_r|, r = {RANK} or the smaller side"
    m, n = map(int, name.split("x"))
    weights = [torch.randn(m, n, generator=torch.Generator().manual_seed(0)).mul_(0.02)]
    return weights, [clustered_indices(m, n, DENSITY, seed=0)], {}, "random 5 % clustered by rows"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory, GGUF file or hub id in place of the bundled SmolLM2-135M")
    parser.add_argument("--runs", type=int, default=20, help="rounds of alternating runs")
    parser.add_argument("--sets", nargs="+", default=["smollm2", "4096x4096", "4096x11008"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--no-context", action="store_true", help="leave out the slow peers and write no files")
    bench_util.add_output_options(parser)
    arguments = parser.parse_args(argv)
    if not dispatch.backends()["native-cpu"].usable:
        raise SystemExit(f"no native backend: {dispatch.backends()['native-cpu'].reason}")
    sets, runs, mib = (["dry"], 2, 8) if arguments.dry_run else (arguments.sets, arguments.runs, 256)

    table: list[dict] = []
    for name in sets:
        weights, lists, refreshes, masks = shape_set(name, arguments.model)
        arena = Arena.of(lists)
        for dtype in arguments.dtypes:
            entrants, wrong = contestants(weights, arena, {"fp32": FP32, "bf16": BF16}[dtype], not arguments.no_context)
            times, bandwidth = bench_util.alternate_with_copy(entrants, runs, mib=mib)
            labels = {"op": "sparse_adamw_", "set": f"{name}, {dtype}", "masks": masks, "matrices": len(lists)}
            new = [
                row | {"status": "ok"}
                for row in bench_util.rows(entrants, times, entrants[0].name, bandwidth, **labels)
            ]
            sparse = [row for row in new if "grads" in row["variant"]]
            new += [with_refresh(row, new[0], *refresh) for refresh in refreshes.items() for row in sparse]
            new += [labels | {"variant": variant, "status": status} for variant, status in wrong.items()]
            bench_util.show(new, COLUMNS)
            table += [row | bench_util.environment() for row in new]
            del entrants
    folder = None if arguments.no_context else bench_util.output_folder(arguments)
    if folder:
        bench_util.write_csv(folder / "sparse_adamw.csv", table)
        plots.draw("sparse_adamw", folder)
    return bench_util.exit_status(table)


def with_refresh(row: dict, baseline: dict, name: str, seconds: float) -> dict:
    """The row of a sparse step with a hundredth of a refresh added."""
    median = float(f"{row['median_ms'] + 1e3 * seconds / 100:.4g}")
    return row | {
        "variant": f"{row['variant']} + {name}/100",
        "median_ms": median,
        "q25_ms": "",
        "q75_ms": "",
        "ratio": float(f"{baseline['median_ms'] / median:.4g}"),
        "floor_ms": "",
        "share_of_floor": "",
    }


if __name__ == "__main__":
    raise SystemExit(main())
