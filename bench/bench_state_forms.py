"""What moments in 8 bits and split masters change in a training run, paired by seed.

The default fine-tuning job is trained with each form of state. Its linear layers have bf16 weights,
which the forward pass widens to fp32: products in bf16 take CPUs without instructions for them an
hour. Everything else is fp32. Seeds decide the problems and their order, and both forms of a seed
see the same. Before training and after, the loss on held-out samples is measured. Their difference
is what training gains. A row says how much of it a form gains more or less than the first one.

    python -m bench.bench_state_forms [--seeds 5] [--steps 60] [--csv FILE]
        (3 minutes a run on two cores, two runs a seed)
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from lift_kernels.finetune import origin
from lift_kernels.finetune.config import Settings
from lift_kernels.finetune.loading import load
from lift_kernels.finetune.measure import losses_of
from lift_kernels.finetune.methods import prepare
from lift_kernels.finetune.parallel import Ranks
from lift_kernels.finetune.timing import Clock
from lift_kernels.finetune.training import train
from lift_kernels.nn.functional import LiftLinearFunction
from lift_kernels.nn.linear import LiftLinear
from lift_kernels.nn.weight_kinds import LINEAR, weights_of

FORMS: dict[str, dict[str, str]] = {
    "fp32": {"state_dtype": "float32", "master": "fp32", "grad_dtype": "float32"},
    "small": {"state_dtype": "8bit", "master": "split", "grad_dtype": "bfloat16"},
}
"""Options of the forms; the first is the one that others are compared with."""
COLUMNS = "form seed steps loss_before loss_after gain difference moved state_bytes_an_entry seconds machine commit"


def widened_plain(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a layer whose bf16 weight is widened to the dtype of ``x``."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias)


def widened(layer: LiftLinear, x: torch.Tensor) -> torch.Tensor:
    """The same of a packed layer."""
    return LiftLinearFunction.apply(
        x, layer.values, layer.weight, layer.bias, layer.indices, False, x.dtype, layer.lift_backend
    )


def trained(settings: Settings, form: str, before: float | None) -> dict[str, Any]:
    """Train the job with a form of state, and return the columns of its row.

    Args:
        settings: of the job, with fp32 weights.
        form: a key of `FORMS`.
        before: the held-out loss before training, where another form has measured it.
    """
    began = time.perf_counter()
    ranks = Ranks()
    job = load(settings, ranks)
    model: Any = job.model
    linear = [w.parameter for w in weights_of(model) if w.kind == LINEAR]
    with torch.no_grad():
        for p in linear:
            p.copy_(p.bfloat16())
    before = _loss(model, job, ranks) if before is None else before
    for p in linear:
        p.data = p.data.bfloat16()
    nn.Linear.forward, LiftLinear.forward = widened_plain, widened  # type: ignore[method-assign]
    stored = replace(settings, dtype="bfloat16", **FORMS[form])  # `prepare` reads what concerns the state
    ready = prepare(model, job.tokenizer, stored, job.data, Clock(model.device), None)
    first = [p.clone() for p in ready.covered]
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(model.device)
        train(
            model,
            job.tokenizer,
            ready.optimizer,
            job.data,
            job.steps,
            settings,
            clock=clock,
            ranks=ranks,
            folder=Path(folder),
        )
    after = _loss(model, job, ranks)
    entries = sum(
        ready.optimizer.state[p]["indices"].numel() for g in ready.optimizer.param_groups for p in g["params"]
    )
    return {
        "form": form,
        "seed": settings.seed,
        "steps": job.steps,
        "loss_before": before,
        "loss_after": after,
        "gain": before - after,
        "moved": sum(int((p != was).sum()) for p, was in zip(ready.covered, first)),
        "state_bytes_an_entry": ready.optimizer.state_bytes() / entries,  # type: ignore[attr-defined]
        "seconds": time.perf_counter() - began,
        "machine": origin.machine(model.device),
        "commit": origin.commit(),
    }


def _loss(model: Any, job: Any, ranks: Ranks) -> float:
    """The mean over held-out samples of their loss, in nats a token."""
    losses = losses_of(model, job.tokenizer, job.data.encoded, ranks, "held-out loss")
    return sum(loss / tokens for loss, tokens in losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        settings = Settings(seed=seed, steps=options.steps, metric="none", save_steps=0)
        transformers.set_seed(seed)
        base = None
        for form in FORMS:
            row = trained(settings, form, None if base is None else base["loss_before"])
            base = base or row
            row["difference"] = row["gain"] / base["gain"] - 1
            rows.append(row)
            print(f"seed {seed}, {form}: gain {row['gain']:.4f}, {100 * row['difference']:+.2f} %", flush=True)
            if options.csv is not None:
                with options.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS.split())
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
