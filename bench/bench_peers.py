"""The step beside every peer: milliseconds and bytes of optimizer state, for all matrices, on
shared weights and gradients.

Peers come from the extra ``[bench]``. One that is not installed, does not run on this device or is
switched off has a row without a time whose ``status`` says why; none is left out. Our variants are
first checked against `lift_kernels.ops.reference`; a wrong one has a row without a time too, and
the exit status is 1.

- ``state_bytes``: bytes of all distinct tensor storages behind an optimizer's state after its first
  step, per parameter of the matrices; ``computed_bytes`` is what its documented form should take,
  where we can say. Ours counts indices, moments and master.
- ``first_step_s``: the first step, untimed otherwise: GaLore makes its projections there (again
  every 200 steps; its projection is a view into a whole factor of the SVD, which therefore stays)
  and torchao compiles there. The published step's and our masks are made before.
- SHiRA: the packed fp32 values that peft trains, under torch's fused AdamW. Its forward pass builds
  the weight anew; not counted.
- Floor: as in `bench_sparse_adamw` for ours and for dense AdamW; empty for others.

    python bench/bench_peers.py [--sets 2048x2048 smollm2] [--dtypes fp32 bf16] [--runs 6] [--only
    NAME ...]
        [--device cpu] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import bench_util
import torch
from bench_arena import Arena, clustered_indices
from bench_sparse_adamw import BF16, DENSITY, FP32, HYPER, RANK, Published, Sparse, model_weights
from bench_util import Contestant
from torch import Tensor, nn

from bench import plots
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
BLOCK = 256  # entries that share a scale in bitsandbytes and torchao


def storages(value: object, seen: set[int]) -> Iterator[int]:
    """Bytes of each tensor storage within nested containers, tensor subclasses and plain objects,
    every storage once.
    """
    if isinstance(value, nn.Parameter):
        return  # the weights themselves, as a group holds them
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from storages(getattr(value, name), seen)
        elif value.untyped_storage().data_ptr() not in seen:
            seen.add(value.untyped_storage().data_ptr())
            yield value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from storages(inner, seen)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from storages(inner, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from storages(vars(value), seen)


def state_bytes(state: object) -> int:
    return sum(storages(state, set()))


def parameters(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters that share the weights, with the gradients."""
    result = [nn.Parameter(weight) for weight in weights]
    for parameter, grad in zip(result, grads):
        parameter.grad = grad
    return result


def attribute(package: str, module: str, name: str) -> Callable:
    """A peer's class; ImportError says what to install."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"not installed ({error.name} is missing): pip install {package}") from None


def optimizer(package: str, module: str, name: str, group: dict | None = None) -> Callable:
    """Builds a peer's optimizer over one group with our hyperparameters."""

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
    """Our Triton kernel, launched once a parameter."""

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], arena: Arena) -> None:
        if not weights[0].is_cuda:
            raise NotImplementedError("needs a GPU")
        pieces = zip(weights, grads, arena.lists())
        self.each = [Sparse([weight], [grad], Arena.of([index])) for weight, grad, index in pieces]
        self.state = [(one.arena.indices, one.exp_avg, one.exp_avg_sq, one.steps) for one in self.each]

    def step(self) -> None:
        for one in self.each:
            one("triton")


LOW_RANK = {"rank": RANK, "update_proj_gap": 200, "proj_type": "std"}
PEERS: dict[str, Callable] = {
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
    """Bytes of state per parameter that a peer's form implies, or None."""
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


def peer(name: str, weights: Sequence[Tensor], grads: Sequence[Tensor], arena: Arena) -> tuple[Contestant | None, dict]:
    """The peer after its first step and what its row says beside the time, or None and why it
    cannot run.
    """
    try:
        built = PEERS[name](weights, grads, arena)
        start = time.perf_counter()
        built.step()
        if weights[0].is_cuda:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
    except Exception as error:  # whatever a foreign package raises is its row's status
        text = " ".join(str(error).split())[:160]
        plain = isinstance(error, (ImportError, NotImplementedError))
        return None, {"status": text if plain else f"{type(error).__name__}: {text}"}
    numel = sum(w.numel() for w in weights)
    computed = computed_bytes(name, weights, arena)
    floor = 7.0 * numel * weights[0].element_size() if name.startswith("AdamW") else None
    return Contestant(name, built.step, floor), {
        "state_bytes": round(
            state_bytes(list(built.state) if isinstance(built.state, list) else dict(built.state)) / numel, 4
        ),
        "computed_bytes": "" if computed is None else round(computed, 4),
        "first_step_s": round(first, 3),
        "status": "ok",
    }


def forms(dtype: torch.dtype) -> dict[str, dict]:
    if dtype == FP32:
        return {"": {}}
    return {", fp32 moments and master": {"master": True}, ", bf16 moments, no master": {"moment": BF16}}


def ours(weights, grads, arena: Arena, dtype: torch.dtype) -> Iterator[tuple[str, Contestant | None, dict]]:
    """`sparse_adamw_` from dense and packed gradients, by the default backend and the others;
    checked.
    """
    numel = sum(w.numel() for w in weights)
    for packed in (False, True):
        for label, options in forms(dtype).items():
            sparse = Sparse(weights, grads, arena, packed=packed, **options)
            name = f"sparse_adamw_, {'packed' if packed else 'dense'} grads{label}"
            if problem := sparse.check():
                yield name, None, {"status": f"refused, it is wrong: {problem}"}
                continue
            held = [arena.indices, sparse.exp_avg, sparse.exp_avg_sq, sparse.master, sparse.steps]
            entry = 4 + 2 * sparse.exp_avg.element_size() + 4 * bool(options.get("master"))
            said = {
                "state_bytes": round(state_bytes(held) / numel, 4),
                "status": "ok",
                "computed_bytes": round(entry * arena.entries / numel, 4),
            }
            yield name, Contestant(name, sparse, sparse.floor_bytes()), said
            if not packed and not label:
                name = "sparse_adamw_, dense grads, reference"
                yield name, Contestant(name, lambda sparse=sparse: sparse("reference")), said
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
    """One row a contestant, those without a time included."""
    weights, arena = [w.to(device, dtype, copy=True) for w in weights], Arena.of([index.to(device) for index in lists])
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(w.shape, generator=generator).mul_(1e-3).to(device, dtype) for w in weights]
    found = list(ours(weights, grads, arena, dtype))
    for label in PEERS:
        if only is None or label in only or label == "AdamW fused":
            found.append((label, *peer(label, weights, grads, arena)))
        else:
            found.append((label, None, {"status": "switched off by --only"}))
    published, numel = Published(list(weights), grads, arena), sum(w.numel() for w in weights)
    held = [published.masks, published.exp_avg, published.exp_avg_sq]
    said = {
        "state_bytes": round(state_bytes(held) / numel, 4),
        "status": "ok",
        "computed_bytes": round(1 + 2 * weights[0].element_size() * arena.entries / numel, 4),
    }
    found.append(("published LIFT step", Contestant("published LIFT step", published), said))
    entrants = [entrant for _, entrant, _ in found if entrant is not None]
    times, bandwidth = bench_util.alternate_with_copy(
        entrants, runs, warmup=1, device=device, mib=32 if runs < 3 else 256
    )
    labels = {
        "op": "step",
        "set": f"{name}, {str(dtype).removeprefix('torch.')}",
        "matrices": len(weights),
        "parameters": numel,
    }
    timed = {r["variant"]: r for r in bench_util.rows(entrants, times, "AdamW fused", bandwidth, **labels)}
    return [labels | {"variant": label} | timed.get(label, {}) | said for label, _, said in found]


def shapes(name: str, model: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and index lists: SmolLM2's (or ``model``'s) with their real masks, or one random
    matrix with a clustered mask.
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
    parser.add_argument("--only", nargs="*", help="peers to run; the others' rows say that they were switched off")
    parser.add_argument("--out", type=Path, help="folder for the files in place of bench/results/<device>")
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
            bench_util.show(new, COLUMNS)
            table += [row | bench_util.environment(arguments.device) for row in new]
    folder = arguments.out or bench_util.results_folder(arguments.device)
    bench_util.write_csv(folder / "peers.csv", table)
    plots.draw("peers", folder)
    return int(any(row["status"].startswith("refused") for row in table))


if __name__ == "__main__":
    raise SystemExit(main())
