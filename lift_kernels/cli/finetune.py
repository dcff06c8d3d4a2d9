"""The command ``finetune``: start or resume a fine-tuning run."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ..errors import UserError


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a language model on question/answer problems and report the result",
        description="Fine-tune a language model on question/answer problems, measure it before and after, and write "
        "a report, a plot and the model. The defaults train SmolLM2-135M-Instruct on generated word problems.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR|GGUF|ID",
        help="model directory, GGUF file or hub id (default: the bundled SmolLM2-135M)",
    )
    add("--data", metavar="JSONL", help='file with lines {"question": ..., "answer": ...}; at most a fifth is held out')
    add(
        "--method",
        help="lift, full, lora or random; random trains as many entries as lift, chosen at random (default: lift)",
    )
    add(
        "--gradients",
        help="packed or dense, for methods lift and random; packed: identical result, lower memory (default: packed)",
    )
    add("--density", type=float, help="share of each matrix that is trained (default: 0.05)")
    add("--rank", type=int, help="rank of the approximation that selects the entries (default: 64)")
    add("--budget-rank", type=int, help="train (rows + columns) x this many entries per matrix, instead of --density")
    add(
        "--extra",
        metavar="REGEX",
        help="further weights to train beside the linear layers, by name (default: stacked expert weights (3-D); "
        "'' for none)",
    )
    add("--refresh-interval", type=int, metavar="STEPS", help="steps between mask refreshes, 0 for none (default: 25)")
    add(
        "--refresh-drift",
        type=float,
        metavar="SHARE",
        help="refresh a mask only when this share of its entries would change, by prediction; 0 refreshes all "
        "(default: 0.03)",
    )
    add("--steps", type=int, help="optimizer steps (default: 60)")
    add("--lr", type=float, help="peak learning rate (default: 1e-3; full: 1e-4)")
    add("--batch-size", type=int, help="problems per step (default: 8)")
    add("--max-length", type=int, metavar="TOKENS", help="leave out problems with more tokens (default: 512)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32)")
    add("--device", help="auto, cpu or cuda (default: auto)")
    add("--seed", type=int, help="seed of problems, order and random masks (default: 0)")
    add("--eval-problems", type=int, help="number of held-out problems to answer (default: 100)")
    add("--name", help="directory of the run inside --output (default: method and time)")
    add("--output", metavar="DIR", help="directory of all runs (default: runs)")
    add("--save-steps", type=int, metavar="STEPS", help="steps between checkpoints, 0 for none (default: 20)")
    add("--parallel", help="none, or ddp: share each batch out among the ranks of torchrun (default: none)")
    add(
        "--resume",
        metavar="DIR",
        help="continue the interrupted run in this directory, bit-exactly; takes no other option",
    )
    parser.set_defaults(run=run, input_errors=())


def run(options: argparse.Namespace) -> int:
    """Start a run, or resume an interrupted one.

    Raises:
        UserError: for invalid input.
    """
    from ..finetune import Settings, run, settings_of
    from ..finetune.parallel import SaidElsewhere, said_once, speaks_for_node

    given = {f.name: value for f in fields(Settings) if (value := getattr(options, f.name, None)) is not None}
    try:
        with said_once(speaks_for_node):
            if options.resume is not None and given:
                raise UserError(f"--resume takes all options from the interrupted run; leave out {', '.join(given)}")
            settings = Settings(**given) if options.resume is None else settings_of(options.resume)
        run(settings, resumed=options.resume is not None)
    except SaidElsewhere:
        return 2
    return 0
