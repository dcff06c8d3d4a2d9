"""Bytes per parameter that training takes beside the weights, measured and computed.

The matrices of two layers of SmolLM2-135M's form, with random weights (bytes depend on shapes
alone), are trained by every method for one real backward pass and step. Nothing else is trained.
The columns are in bytes per parameter of these matrices. They count the distinct tensor storages:

- ``added``: trained vectors or factors beside the base's weights, and their index lists where the
  method keeps them in the model.
- ``gradients``: what the backward pass leaves. SHiRA also makes a dense one for each matrix on its
  way, which is freed again.
- ``indices``, ``master`` (with packed gradients the trained values), ``moments`` (with everything
  else in the optimizer's state).
- ``warm_start``: bases from which LIFT's next masks start. ``warm_start=None`` keeps none, and
  ``"cpu"`` keeps none on a GPU.
- ``total`` of these, measured. ``computed``: what the method's format should take. Not computed are
  step counters, the padding of LIFT's segments to 64 entries, and tables of block-wise formats.
  GaLore keeps the whole factor of the SVD that its projection is a view into.
- ``share_of_adamw``: total over that of torch.optim.AdamW on weights of this dtype.

LIFT is refused when measured and computed differ by more than 3 %. The exit status is then 1. A
method that cannot run here has a row whose status begins with ``missing:``. A combination that does
not exist has one that begins with ``not offered:``.

    python -m bench.bench_memory [--dry-run] [--out DIR]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import plots
from bench.common import results, training_methods
from bench.common.baselines import BLOCK, attribute, tensors_within
from bench.common.training_methods import HYPER, RANK, adapter_rank, matrices
from lift_kernels import LiftAdamW
from lift_kernels._storage import storage_bytes

PARTS = ["added", "gradients", "indices", "master", "moments", "warm_start"]
COLUMNS = ["set", "variant", *PARTS, "total", "computed", "share_of_adamw", "status"]
SHAPE = (576, 1536, 2, 256)  # hidden size, that of the MLP, layers, vocabulary
FP32, BF16 = torch.float32, torch.bfloat16
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (FP32, {}),
    "bf16, fp32 moments and master": (BF16, {}),
    "bf16, bf16 moments, no master": (BF16, {"master": None, "state_dtype": BF16}),
}
ADAMW = "AdamW fused"


def on_matrices(package: str, module: str, name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return attribute(package, module, name)(matrices(model), 1e-3, **HYPER)

    return build


def galore(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = training_methods.galore(model)
    optimizer.param_groups[0]["params"] = []
    return optimizer


BASELINES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    ADAMW: lambda model: torch.optim.AdamW(matrices(model), 1e-3, **HYPER, fused=True),
    "bitsandbytes AdamW8bit": on_matrices("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": on_matrices("torchao", "torchao.optim", "AdamW8bit"),
    "flashoptim FlashAdamW": on_matrices("flashoptim", "flashoptim", "FlashAdamW"),
    f"GaLore, r = {RANK}": galore,
    "LoRA (peft), AdamW fused": training_methods.METHODS["LoRA (peft), AdamW fused"],
    "SHiRA (peft), AdamW fused": training_methods.METHODS["SHiRA (peft), AdamW fused"],
}


def computed(name: str, weights: Sequence[Tensor], options: dict[str, Any], rank: int) -> float | None:
    """Bytes per parameter of ``weights`` beside them, without bases for warm starts; or None."""
    numel, width = sum(w.numel() for w in weights), weights[0].element_size()
    if name.startswith("LIFT"):
        entries = sum(round(training_methods.DENSITY * w.numel()) for w in weights)
        packed, master = "packed" in name, width < 4 and options.get("master", "fp32") is not None
        moments = 2 * options.get("state_dtype", FP32).itemsize
        return entries * (4 + moments + 4 * (master or packed) + 4 * packed) / numel + (0 if packed else width)
    entries = rank * sum(m + n for m, n in (w.shape for w in weights))
    if name.startswith("LoRA"):
        return 16 * entries / numel
    if name.startswith("SHiRA"):
        return (16 + 8) * entries / numel
    if "8bit" in name:
        return width + 2 + 8 / BLOCK
    return 3.0 * width if name == ADAMW else None


def extra(model: nn.Module, known: set[int]) -> Iterator[Tensor]:
    """Tensors that the model did not have before.

    Index lists that modules keep as attributes are among them.
    """
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        held += [t for value in vars(module).values() if isinstance(value, dict) for t in value.values()]
        yield from (t.detach() for t in held if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known)


def measure(build: Callable[[nn.Module], torch.optim.Optimizer], model: nn.Module) -> tuple[dict[str, int], int]:
    """Bytes of each of `PARTS` once the model was trained for one step.

    Also the bytes that the bases for warm starts should take.
    """
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    model.requires_grad_(False)
    for weight in matrices(model):
        weight.requires_grad_(True)
    optimizer = build(model)
    tokens = training_methods.random_tokens(model.config.vocab_size, (1, 8), "cpu")
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    bases = 0
    found = dict.fromkeys(PARTS, 0) | {"gradients": storage_bytes(tensors_within([p.grad for p in trained]))}
    optimizer.step()
    if isinstance(optimizer, LiftAdamW):
        for arena in optimizer._table.arenas.values():
            for name, held in arena.buffers().items():
                found["moments" if name.startswith("exp_avg") else name] += storage_bytes([held])
            found["moments"] += storage_bytes([arena.steps])
        bases = sum(s[key].nbytes for s in optimizer.state.values() for key in ("basis", "threshold") if key in s)
        found["warm_start"] = optimizer.state_bytes() - sum(found[part] for part in ("indices", "master", "moments"))
    else:
        found["moments"] = storage_bytes(tensors_within(dict(optimizer.state)))
        found["added"] = storage_bytes(extra(model, known))
    return found, bases


def row(
    name: str, build: Callable, dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, int, int, int]
) -> dict:
    """The row of a method without its share."""
    model = training_methods.random_model(training_methods.llama_config(*shape), dtype, "cpu")
    weights = [w.detach() for w in matrices(model)]
    numel, rank = sum(w.numel() for w in weights), adapter_rank(model)
    try:
        with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which changes no state
            parts, bases = measure(build, model)
    except Exception as error:  # whatever another package raises is its row's status
        return {"variant": name, "status": training_methods.failed(name, error)}
    right = computed(name, weights, options, rank)
    if right is not None:
        right += bases / numel
    total = sum(parts.values()) / numel
    off = right is not None and abs(total - right) > 0.03 * right
    status = (
        f"refused, it is wrong: {total:.4f} bytes measured, {right:.4f} computed" if off and "LIFT" in name else "ok"
    )
    said = {"total": round(total, 4), "computed": "" if right is None else round(right, 4), "parameters": numel}
    measured = {part: round(size / numel, 4) for part, size in parts.items()} | said
    return {"variant": name} | ({} if status != "ok" else measured) | {"status": status}


def compare(shape: tuple[int, int, int, int]) -> list[dict]:
    table = []
    for form, (dtype, options) in FORMS.items():
        rows = []
        if form != "bf16, fp32 moments and master":  # baselines' moments have the dtype of what they train
            rows += [row(name, build, dtype, {}, shape) for name, build in BASELINES.items()]
        for name in (training_methods.MATRIX, training_methods.PACKED):
            if name == training_methods.PACKED and "master" in options:
                rows.append({"variant": name, "status": "not offered: packed mode keeps its trained values in fp32"})
                continue
            rows.append(row(name, functools.partial(training_methods.METHODS[name], **options), dtype, options, shape))
        table += [{"op": "memory", "set": form, "layers": shape[2], "hidden_size": shape[0]} | r for r in rows]
    adamw = {r["set"][:4]: r["total"] for r in table if r["variant"] == ADAMW}
    return [r | ({"share_of_adamw": round(r["total"] / adamw[r["set"][:4]], 4)} if "total" in r else {}) for r in table]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dry-run", action="store_true", help="smaller matrices, files in a temporary folder unless --out"
    )
    parser.add_argument("--out", type=Path, help="folder for the file in place of bench/results/<device>-<level>")
    given = parser.parse_args(argv)
    if given.dry_run:
        given.out = given.out or Path(tempfile.mkdtemp())
    table = [r | results.environment() for r in compare((128, 320, 1, 64) if given.dry_run else SHAPE)]
    results.show(table, COLUMNS)
    folder = given.out or results.results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    results.write_csv(folder / "memory.csv", table)
    plots.draw("memory", folder)
    return int(any(r["status"].startswith("refused") for r in table))


if __name__ == "__main__":
    raise SystemExit(main())
