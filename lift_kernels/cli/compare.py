"""The command ``compare``: is LIFT the right choice for this model and this data?"""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UserError
from .finetune import add_data, add_masks, add_training, methods_help


def add_parser(commands: Any) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "compare",
        help="compare fine-tuning methods on a model and data: which one wins, ties or loses, and by how much",
        description="Compare fine-tuning methods on a model and data. Each method gets its best learning rate by\n"
        "validation loss, then runs with several seeds. Only these final runs see the test part. Every\n"
        "finished run is a row of a CSV file: the same command, or --resume, goes on after an interruption.",
        usage="%(prog)s [options]",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,  # --seed of finetune would be taken for --seeds
    )
    _add_design(parser.add_argument_group("comparison"))
    add_data(parser.add_argument_group("data"))
    add_masks(parser.add_argument_group("masks", "which weights are trained"))
    add_training(parser.add_argument_group("training"), steps=30)
    _add_measuring(parser.add_argument_group("measuring"))
    _add_output(parser.add_argument_group("output"))
    parser.set_defaults(run=run, input_errors=())


def _add_design(group: Any) -> None:
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        metavar="METHOD[@RATE]",
        help="the first is the reference; METHOD@RATE fixes the rate, and none is searched; a name\ntwice is a second "
        f"entry with seeds of its own (default: lift random full lora)\n{methods_help()}",
    )
    add("--seeds", type=int, metavar="N", help="seeds of each method in the final runs (default: 3)")
    add("--rates", nargs="+", metavar="METHOD=RATE", help="first rate of a search (default: that of finetune)")
    add("--most-rates", type=int, metavar="N", help="most rates that a search tries; 1 takes the first (default: 7)")
    add("--validation", type=int, metavar="SAMPLES", help="samples that choose the rates (default: 64, or fewer)")
    add("--test", type=int, metavar="SAMPLES", help="samples that only final runs see (default: 200, or fewer)")
    add(
        "--budget",
        metavar="TIME",
        help="begin no run that would end after this time, such as 90s, 30m or 2h; --resume goes on\n"
        "(default: no limit)",
    )
    add(
        "--quick",
        action="store_true",
        default=None,
        help="a first look in a directory of its own: other defaults, with one rate, one seed,\n20 steps and fewer "
        "samples",
    )


def _add_measuring(group: Any) -> None:
    add = group.add_argument
    add("--metric", help="how answers of final runs are scored: number, exact, choice or none (default: none)")
    add(
        "--neutral",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="further texts whose loss shows what is forgotten",
    )
    add("--pieces", type=int, metavar="N", help="most pieces of neutral text (default: all)")


def _add_output(group: Any) -> None:
    add = group.add_argument
    add(
        "--task",
        metavar="NAME",
        help="name of the data in rows and directory (default: that of the files); several may\nshare a directory, "
        "and table, verdict and picture are those of the last one",
    )
    add("--output", metavar="DIR", help="directory of the comparison (default: runs/compare-TASK)")
    add(
        "--resume",
        metavar="DIR|CSV",
        help="go on with the comparison in this directory, with its options; methods and seeds\nmay be added, and "
        "--model, --data and --neutral say where files lie now",
    )


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
    if (place := given.pop("resume", None)) is None:
        compare(from_command(given))
        return 0
    if "output" in given:
        raise UserError("--resume goes on in its own directory; leave out --output")
    compare(resumed(place, given.pop("task", None), given))
    return 0
