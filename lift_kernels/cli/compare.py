"""The command ``compare``: is LIFT the right choice for this model and this data?"""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UserError


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "compare",
        help="compare fine-tuning methods on a model and data: which one wins, ties or loses, and by how much",
        description="Compare fine-tuning methods on a model and data. Every method gets its best learning rate by "
        "validation loss, and runs with several seeds. The test part is only seen by these final runs. Finished runs "
        "are rows of a CSV file: the same command, or --resume, goes on where one was interrupted.",
    )
    _design_options(parser.add_argument_group("comparison"))
    _data_options(parser.add_argument_group("model and data"))
    _training_options(parser.add_argument_group("training"))
    parser.set_defaults(run=run, input_errors=())


def _design_options(group: Any) -> None:
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        metavar="METHOD[@RATE]",
        help="methods to compare; the first is the reference. METHOD@RATE fixes a rate, so that none is searched. A "
        "name twice gives a second entry with seeds of its own (default: lift random full lora)",
    )
    add("--seeds", type=int, metavar="N", help="seeds of each method in the final runs (default: 3; quick: 1)")
    add("--rates", nargs="+", metavar="METHOD=RATE", help="first rate of a search (default: that of finetune)")
    add("--most-rates", type=int, metavar="N", help="most rates of a search; 1 takes the first (default: 7; quick: 1)")
    add("--validation", type=int, metavar="N", help="samples that choose the rates (default: 64; quick: 32)")
    add("--test", type=int, metavar="N", help="samples that only final runs see (default: 200; quick: 64)")
    add("--budget", metavar="TIME", help="begin no run that would end later, such as 90s, 30m or 2h (default: none)")
    add("--quick", action="store_true", default=None, help="one rate, one seed and 20 steps: a first look")
    add("--task", metavar="NAME", help="name of the data in the rows (default: that of the data)")
    add("--output", metavar="DIR", help="directory of the comparison (default: runs/compare-TASK)")
    add("--resume", metavar="DIR|CSV", help="go on with the comparison in this directory, with its options")


def _data_options(group: Any) -> None:
    add = group.add_argument
    add("--model", metavar="DIR|GGUF|ID", help="model directory, GGUF file or hub id (default: the bundled one)")
    add("--data", nargs="+", metavar="DATA", help="data of finetune (default: generated word problems)")
    add("--split", help="split of data that has several (default: train)")
    add("--problems", help="generated problems: plain or hard (default: plain)")
    add("--loss", help="answers or all tokens (default: answers)")
    add("--shots", type=int, help="worked examples in front of a question")
    add("--packing", action="store_true", default=None, help="join samples that do not see each other")
    add("--truncate", action="store_true", default=None, help="cut long samples, in place of leaving them out")
    add("--metric", help="how final answers are scored: number, exact, choice, or none (default: none)")
    add("--neutral", nargs="+", metavar="FILE", help="text files whose loss shows forgetting, too")
    add("--max-length", type=int, metavar="TOKENS", help="longest sample (default: 512)")


def _training_options(group: Any) -> None:
    add = group.add_argument
    add("--steps", type=int, help="optimizer steps of a run (default: 30; quick: 20)")
    add("--epochs", type=float, help="passes over the training data, in place of --steps")
    add("--batch-size", type=int, help="samples per step (default: 8)")
    add("--density", type=float, help="share of each matrix that is trained (default: 0.05)")
    add("--rank", type=int, help="rank of the approximation that selects the entries (default: 64)")
    add("--budget-rank", type=int, help="train (rows + columns) x this many entries per matrix, instead of --density")
    add("--refresh-interval", type=int, metavar="STEPS", help="steps between mask refreshes, 0 for none (default: 25)")
    add("--refresh-drift", type=float, metavar="SHARE", help="refresh a mask only for this drift (default: 0.03)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32)")
    add("--autocast", action="store_true", default=None, help="forward passes in bfloat16")
    add("--device", help="auto, cpu or cuda (default: auto)")


def run(options: argparse.Namespace) -> int:
    """Start a comparison, or go on with one; return 0.

    Raises:
        UserError: for invalid input.
    """
    from ..finetune.comparison.options import from_command, resumed
    from ..finetune.comparison.session import compare

    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("command", "run", "input_errors"):
        given.pop(name, None)
    place, task = given.pop("resume", None), given.get("task")
    if place is not None:
        if "output" in given:
            raise UserError("--resume goes on in its own directory; leave out --output")
        given.pop("task", None)
        compare(resumed(place, task, given))
    else:
        compare(from_command(given))
    return 0
