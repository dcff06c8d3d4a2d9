"""Runs an experiment with LIFT in PEFT's comparison on MetaMathQA.

    python -m bench.metamathqa --peft DIR EXPERIMENT

An experiment is a directory METHOD/NAME with a training_params.json, given by its path or by its
name in bench/metamathqa/experiments/lift. The result goes where PEFT's own go, into its checkout.
bench/metamathqa/README.md has all commands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import ROOT
from bench.metamathqa.entry import ComparisonError, enter, load_comparison

EXPERIMENTS = ROOT / "bench" / "metamathqa" / "experiments" / "lift"


def experiment_directory(name: str) -> Path:
    """Return the directory of an experiment that is given by its path or its name.

    Raises:
        ComparisonError: where there is none.
    """
    for path in (EXPERIMENTS / name, Path(name)):
        if (path / "training_params.json").is_file():
            return path.resolve()
    known = ", ".join(sorted(path.name for path in EXPERIMENTS.iterdir()))
    raise ComparisonError(f"no training_params.json in {name}; give a directory that has one, or one of {known}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metamathqa",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peft", type=Path, required=True, metavar="DIR", help="checkout of huggingface/peft")
    parser.add_argument("--delta", type=Path, help="file for what was trained (default: EXPERIMENT.delta)")
    parser.add_argument("experiment", metavar="EXPERIMENT")
    options = parser.parse_args(argv)
    try:
        directory = experiment_directory(options.experiment)
        run = load_comparison(options.peft.resolve())
    except ComparisonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run.print_verbose = partial(print, file=sys.stderr)  # their command line sets it
    statuses = enter(run, options.delta or Path(f"{directory.name}.delta"))
    name = f"{directory.parent.name}/{directory.name}"
    run.main(path_experiment=str(directory), experiment_name=name, clean=True, bucket_name=None)
    return int(statuses != ["success"])


if __name__ == "__main__":
    sys.exit(main())
