"""The step beside other optimizers: milliseconds and bytes of state.

All share weights and gradients. Baselines come from the extra ``[bench]``. One that is not
installed, does not run on this device or is switched off has a row without a time whose ``status``
says why. None is left out. This package's variants are first checked against
`lift_kernels.ops.reference`. A wrong one has a row without a time too, and the exit status is 1.

- ``state_bytes``: bytes of all distinct tensor storages behind an optimizer's state after its first
  step, per parameter of the matrices. LIFT's count indices, moments and master.
- ``computed_bytes``: what the documented format should take, where it is known.
- ``first_step_s``: the first step, which is not part of the time. GaLore makes its projections
  there (again every 200 steps; its projection is a view into a whole factor of the SVD, which
  therefore stays), and torchao compiles there. The masks of LIFT and of the authors' step are made
  before.
- SHiRA: the packed fp32 values that peft trains, under torch's fused AdamW. Its forward pass builds
  the whole weight each time, which is not counted.
- Roofline: as in `bench_sparse_adamw` for LIFT and for dense AdamW, empty for others.

    python -m bench.bench_peers [--sets 2048x2048 smollm2] [--dtypes fp32 bf16] [--runs 6]
        [--only NAME ...] [--device cpu] [--out DIR]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import plots
from bench.common import results, timing
from bench.common.arenas import Arena, clustered_indices
from bench.common.baselines import BLOCK, attribute, parameters, tensors_within
from bench.common.matrices import model_weights
from bench.common.steps import BF16, DENSITY, FP32, HYPER, RANK, AuthorsStep, SparseStep
from bench.common.timing import Candidate
from lift_kernels._storage import storage_bytes
from lift_kernels.masks.principal import MaskRequest, principal_masks

COLUMNS = [
    "set",
    "variant",
    "median_ms",
    "ratio",
    "state_bytes",
    "computed_bytes",
    "first_step_s",
    "share_of_floor",
    "status",
]


def optimizer(package: str, module: str, name: str, group: dict | None = None) -> Callable:
    """Builds a baseline's optimizer over one group, with `HYPER` as for all candidates."""

    def build(weights, grads, arena):
        return attribute(package, module, name)([{"params": parameters(weights, grads), **(group or {})}], **HYPER)

    return build


def torch_adamw(**flags: bool) -> Callable:
    return lambda weights, grads, arena: torch.optim.AdamW(parameters(weights, grads), **HYPER, **flags)


def shira(weights: Sequence[Tensor], grads: Sequence[Tensor], arena: Arena) -> torch.optim.Optimizer:
    flat = [index.long() for index in arena.lists()]
    values = [torch.zeros(len(index), device=index.device) for index in flat]
    return torch.optim.AdamW(
        parameters(values, [g.view(-1)[i].float() for g, i in zip(grads, flat)]), **HYPER, fused=True
    )


class IndexedTriton:
    """The Triton kernel of this package, launched once per parameter."""

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], arena: Arena) -> None:
        if not weights[0].is_cuda:
            raise NotImplementedError("needs a GPU")
        pieces = zip(weights, grads, arena.lists())
        self.each = [SparseStep([weight], [grad], Arena.of([index])) for weight, grad, index in pieces]
        self.state = [(one.arena.indices, one.exp_avg, one.exp_avg_sq, one.steps) for one in self.each]

    def step(self) -> None:
        for one in self.each:
            one("triton")


LOW_RANK = {"rank": RANK, "update_proj_gap": 200, "proj_type": "std"}
BASELINES: dict[str, Callable] = {
    "AdamW fused": torch_adamw(fused=True),
    "AdamW foreach": torch_adamw(foreach=True),
    "AdamW for-loop": torch_adamw(foreach=False, fused=False),
    "bitsandbytes AdamW": optimizer("bitsandbytes", "bitsandbytes.optim", "AdamW"),
    "bitsandbytes AdamW8bit": optimizer("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": optimizer("torchao", "torchao.optim", "AdamW8bit"),
    "flashoptim FlashAdamW": optimizer("flashoptim", "flashoptim", "FlashAdamW"),
    f"GaLore, r = {RANK}": optimizer("galore-torch", "galore_torch", "GaLoreAdamW", LOW_RANK | {"scale": 0.25}),
    f"APOLLO, r = {RANK}": optimizer(
        "apollo-torch",
        "apollo_torch",
        "APOLLOAdamW",
        LOW_RANK | {"scale": 1.0, "proj": "random", "scale_type": "channel"},
    ),
    "SHiRA's values, AdamW fused": shira,
    "one indexed Triton launch a parameter": IndexedTriton,
}


def computed_bytes(name: str, weights: Sequence[Tensor], arena: Arena) -> float | None:
    """Bytes of state per parameter that a baseline's format implies, or None."""
    numel, width = sum(w.numel() for w in weights), weights[0].element_size()
    if name.startswith("AdamW"):
        return 2 * width
    if "8bit" in name:
        return 2 + 8 / BLOCK
    if name == "bitsandbytes AdamW":
        return 8.0
    if name.startswith("SHiRA"):
        return 8 * arena.entries / numel
    if name.startswith("GaLore"):
        return width * sum(min(RANK, *w.shape) * (2 * max(w.shape) + min(w.shape)) for w in weights) / numel
    return None


def baseline(
    name: str, weights: Sequence[Tensor], grads: Sequence[Tensor], arena: Arena
) -> tuple[Candidate | None, dict]:
    """The baseline after its first step, and the columns of its row beside the time.

    None and a status when it cannot run.
    """
    try:
        built = BASELINES[name](weights, grads, arena)
        start = time.perf_counter()
        built.step()
        if weights[0].is_cuda:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
    except Exception as error:  # whatever another package raises is its row's status
        text = " ".join(str(error).split())[:160]
        plain = isinstance(error, (ImportError, NotImplementedError))
        return None, {"status": text if plain else f"{type(error).__name__}: {text}"}
    numel = sum(w.numel() for w in weights)
    computed = computed_bytes(name, weights, arena)
    state = built.state if isinstance(built.state, list) else dict(built.state)
    roofline = 7.0 * numel * weights[0].element_size() if name.startswith("AdamW") else None
    return Candidate(name, built.step, roofline), {
        "state_bytes": round(storage_bytes(tensors_within(state)) / numel, 4),
        "computed_bytes": "" if computed is None else round(computed, 4),
        "first_step_s": round(first, 3),
        "status": "ok",
    }


def forms(dtype: torch.dtype) -> dict[str, dict]:
    if dtype == FP32:
        return {"": {}}
    return {", fp32 moments and master": {"master": True}, ", bf16 moments, no master": {"moment": BF16}}


def lift_steps(weights, grads, arena: Arena, dtype: torch.dtype) -> Iterator[tuple[str, Candidate | None, dict]]:
    """`sparse_adamw_` from dense and packed gradients, by the default backend and the others.

    Each is checked.
    """
    numel = sum(w.numel() for w in weights)
    for packed in (False, True):
        for label, options in forms(dtype).items():
            sparse = SparseStep(weights, grads, arena, packed=packed, **options)
            name = f"sparse_adamw_, {'packed' if packed else 'dense'} grads{label}"
            if problem := sparse.check():
                yield name, None, {"status": f"refused, it is wrong: {problem}"}
                continue
            held = [arena.indices, sparse.exp_avg, sparse.exp_avg_sq, sparse.master, sparse.steps]
            entry = 4 + 2 * sparse.exp_avg.element_size() + 4 * bool(options.get("master"))
            said = {
                "state_bytes": round(storage_bytes(tensors_within(held)) / numel, 4),
                "status": "ok",
                "computed_bytes": round(entry * arena.entries / numel, 4),
            }
            yield name, Candidate(name, sparse, sparse.roofline_bytes()), said
            if not packed and not label:
                name = "sparse_adamw_, dense grads, reference"
                yield name, Candidate(name, lambda sparse=sparse: sparse("reference")), said
                if not weights[0].is_cuda:
                    yield "sparse_adamw_, dense grads, Triton", None, {"status": "needs a GPU"}


def compare(
    name: str,
    weights: Sequence[Tensor],
    lists: Sequence[Tensor],
    dtype: torch.dtype,
    runs: int,
    only: Sequence[str] | None = None,
    device: str = "cpu",
) -> list[dict]:
    """One row per candidate, those without a time included."""
    weights, arena = [w.to(device, dtype, copy=True) for w in weights], Arena.of([index.to(device) for index in lists])
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(w.shape, generator=generator).mul_(1e-3).to(device, dtype) for w in weights]
    found = list(lift_steps(weights, grads, arena, dtype))
    for label in BASELINES:
        if only is None or label in only or label == "AdamW fused":
            found.append((label, *baseline(label, weights, grads, arena)))
        else:
            found.append((label, None, {"status": "switched off by --only"}))
    authors, numel = AuthorsStep(list(weights), grads, arena), sum(w.numel() for w in weights)
    held = [authors.masks, authors.exp_avg, authors.exp_avg_sq]
    said = {
        "state_bytes": round(storage_bytes(tensors_within(held)) / numel, 4),
        "status": "ok",
        "computed_bytes": round(1 + 2 * weights[0].element_size() * arena.entries / numel, 4),
    }
    found.append(("published LIFT step", Candidate("published LIFT step", authors), said))
    candidates = [candidate for _, candidate, _ in found if candidate is not None]
    times, bandwidth = timing.time_interleaved_with_copy(
        candidates, runs, warmup=1, device=device, mib=32 if runs < 3 else 256
    )
    labels = {
        "op": "step",
        "set": f"{name}, {str(dtype).removeprefix('torch.')}",
        "matrices": len(weights),
        "parameters": numel,
    }
    timed = {r["variant"]: r for r in results.rows(candidates, times, "AdamW fused", bandwidth, **labels)}
    return [labels | {"variant": label} | timed.get(label, {}) | said for label, _, said in found]


def shapes(name: str, model: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and index lists of a set.

    SmolLM2's (or ``model``'s) come with their real masks, one random matrix with a clustered mask.
    """
    if name == "smollm2":
        weights = model_weights(model)
        requests = [MaskRequest(w, min(RANK, *w.shape), round(DENSITY * w.numel())) for w in weights]
        return weights, [mask.indices for mask in principal_masks(requests)]
    m, n = map(int, name.split("x"))
    weights = [torch.randn(m, n, generator=torch.Generator().manual_seed(0)).mul_(0.02)]
    return weights, [clustered_indices(m, n, DENSITY, seed=0)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory, GGUF file or hub id in place of the bundled SmolLM2-135M")
    parser.add_argument(
        "--sets", nargs="+", default=["2048x2048"], help="smollm2 (minutes: GaLore factors 210 matrices) or MxN"
    )
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--only", nargs="*", help="baselines to run; the others' rows say that they were switched off")
    parser.add_argument("--out", type=Path, help="folder for the files in place of bench/results/<device>-<level>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    table: list[dict] = []
    for name in arguments.sets:
        weights, lists = shapes(name, arguments.model)
        for dtype in arguments.dtypes:
            new = compare(
                name,
                weights,
                lists,
                {"fp32": FP32, "bf16": BF16}[dtype],
                arguments.runs,
                arguments.only,
                arguments.device,
            )
            results.show(new, COLUMNS)
            table += [row | results.environment(arguments.device) for row in new]
    folder = arguments.out or results.results_folder(arguments.device)
    results.write_csv(folder / "peers.csv", table)
    plots.draw("peers", folder)
    return int(any(row["status"].startswith("refused") for row in table))


if __name__ == "__main__":
    raise SystemExit(main())
