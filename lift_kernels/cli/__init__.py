"""Command line: ``python -m lift_kernels finetune|compare|plan|delta|mask|doctor``.

Each command is a module with ``add_parser`` and ``run``. Heavy imports wait until a command runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import UserError
from . import compare, delta, doctor, finetune, mask, plan


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="lift_kernels", description="LIFT: fine-tuning of principal weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (finetune, compare, plan, delta, doctor, mask):
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print its errors in one line.

    Args:
        arguments: command-line arguments; None takes those of the process.

    Returns:
        The exit code: 0 for success, 2 for invalid user input, 130 for an interrupt; `doctor`
        returns 1 for a broken default backend.
    """
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        remedy = f"run `pip install {package}`, or `pip install --no-build-isolation '.[finetune]'` in a clone"
        print(f"error: the package {package} is missing; {remedy} of lift_kernels for all at once", file=sys.stderr)
    except (UserError, OSError, *options.input_errors) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 2
