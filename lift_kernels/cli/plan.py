"""The command ``plan``: what fine-tuning takes in memory, and what fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import UserError


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="say what fine-tuning takes in memory, and which form of it fits",
        description="Say what each form of fine-tuning takes in memory, which of them fit, and how they are run. A\n"
        "model's configuration is enough: weights are neither needed nor read.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with config.json, GGUF file or hub id")
    add("--gpu-memory", metavar="SIZE", help="of each GPU, such as 24GiB: say what fits")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs that share a batch (default: 1)")
    add("--seq", type=int, default=2048, metavar="TOKENS", help="of a sequence (default: 2048)")
    add("--batch", type=int, default=1, metavar="N", help="sequences of a pass on each GPU (default: 1)")
    add("--accumulation", type=int, default=1, metavar="N", help="passes of a step (default: 1)")
    add("--dtype", default="bfloat16", help="of the weights: float32, bfloat16 or float16 (default: bfloat16)")
    add("--density", type=float, default=0.05, metavar="SHARE", help="share that LIFT trains (default: 0.05)")
    add("--budget-rank", type=int, metavar="R", help="train (rows + columns) x R entries, in place of --density")
    add("--rank", type=int, default=64, help="rank of the approximation that selects entries (default: 64)")
    add("--warm-start", metavar="WHERE", help="where bases of masks are kept: device, cpu or none (default: none)")
    add("--json", action="store_true", help="write the numbers as JSON, in bytes")
    parser.set_defaults(run=run, input_errors=())


def run(options: argparse.Namespace) -> int:
    """Print a plan; return 0.

    Raises:
        UserError: for invalid input, and after the plan where no form fits.
    """
    import torch

    from ..planning import plan_memory
    from ..planning.plan_text import refusal

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if options.dtype not in dtypes:
        raise UserError(f"unknown dtype {options.dtype!r}; use one of {', '.join(dtypes)}")
    plan = plan_memory(
        options.model,
        gpu_memory=options.gpu_memory,
        gpus=options.gpus,
        seq=options.seq,
        batch=options.batch,
        accumulation=options.accumulation,
        dtype=dtypes[options.dtype],
        density=options.density,
        budget_rank=options.budget_rank,
        rank=options.rank,
        warm_start=None if options.warm_start == "none" else options.warm_start,
    )
    print(json.dumps(plan.as_dict(), indent=2) if options.json else plan, flush=True)
    if why := refusal(plan):
        raise UserError(why)
    return 0
