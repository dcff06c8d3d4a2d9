"""Memory of fine-tuning Llama-3-8B on 24 GiB and Llama-3-70B on 8 x 80 GiB, computed.

All is computed by `lift_kernels.plan_memory` from the published configurations, for one sequence of
2048 tokens in a pass on each GPU. Nothing is downloaded and nothing was measured on a GPU. On a
CPU, planned and measured peaks of small models agree (python_tests/planning).

    python -m bench.memory_plans [--csv bench/results/computed/memory_plans.csv]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common import results
from lift_kernels.planning import FormPlan, plan_memory

SEQ = 2048
PARTS = ("weights", "values", "indices", "gradients", "moments", "masters", "scratch")
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """A model on some GPUs.

    Attributes:
        sizes: numbers of its configuration, as published.
        gpus, memory: how many GPUs, and GiB of each.
        densities: shares that LIFT trains; the first one has the rows of all forms.
    """

    model: str
    sizes: dict[str, Any]
    gpus: int
    memory: int
    densities: tuple[float, ...]


LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
SMALL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
JOBS = (
    Job("Llama-3-8B", LLAMA_3 | SMALL, 1, 24, (0.05, 0.025)),
    Job("Llama-3-70B", LLAMA_3 | LARGE, 8, 80, (0.05,)),
)


def rows_of(job: Job) -> Iterator[dict[str, Any]]:
    """The CSV rows of a job."""
    from transformers import LlamaConfig

    config = LlamaConfig(**job.sizes, tie_word_embeddings=False)
    for density in job.densities:
        plan = plan_memory(config, gpu_memory=f"{job.memory}GiB", gpus=job.gpus, seq=SEQ, density=density)
        for row in plan.rows:
            if density == job.densities[0] or row.form.startswith("LIFT") and "dense" not in row.form:
                yield row_of(job, density, row)


def row_of(job: Job, density: float, plan: FormPlan) -> dict[str, Any]:
    """The CSV row of a form."""
    name = plan.form if density == job.densities[0] or not plan.lift else f"{plan.form}; {100 * density:g} %"
    parts = {f"{part}_gib": getattr(plan, part) for part in PARTS}
    parts["state_gib"] = plan.values + plan.indices + plan.moments + plan.masters
    parts |= {"activations_gib": plan.activations, "total_gib": plan.total}
    parts |= {"activations_checkpointed_gib": plan.checkpointed, "total_checkpointed_gib": plan.total_checkpointed}
    return (
        {"model": job.model, "gpus": job.gpus, "memory_gib": job.memory, "seq": SEQ, "density": density}
        | {"form": name}
        | {part: f"{(count or 0) / GIB:.2f}" for part, count in parts.items()}
        | {"fits": plan.fits, "today": "yes" if plan.runs else "no"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    options = parser.parse_args()
    rows = [row for job in JOBS for row in rows_of(job)]
    results.show(rows, list(rows[0]))
    if options.csv:
        commit = results.environment()["commit"]
        results.write_csv(options.csv, [row | {"commit": commit} for row in rows])


if __name__ == "__main__":
    main()
