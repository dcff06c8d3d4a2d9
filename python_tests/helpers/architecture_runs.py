"""Fine-tuning runs of tiny models of many architectures, with their delta files.

``make architectures`` runs them all and prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lift_kernels.cli import main as command

from .architectures import ARCHITECTURES, save_architecture
from .bits import bits

DENSITY, RANK = 0.05, 8
SHORT = ["--steps", "3", "--batch-size", "4", "--eval-problems", "4", "--device", "cpu", "--name", "x"]


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        base, model: directories of the model before and after.
        said: what the run printed, and what went wrong.
        share: share of the model's matrices that is trained; 0 where the run ended early.
        delta: what became of its delta file.
        seconds: of the whole.
    """

    base: Path
    model: Path
    said: str
    share: float = 0.0
    delta: str = "not made"
    seconds: float = 0.0


def write_sums(path: Path) -> Path:
    """Write problems of a few bytes each."""
    rows = [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fine_tune(base: Path, folder: Path, *options: str) -> Outcome:
    """Fine-tune a model through the command line, make its delta and apply it.

    Args:
        base: directory of the model.
        folder: directory for the run and the files.
        options: further options of the command.
    """
    start, data = time.perf_counter(), write_sums(folder / "sums.jsonl")
    outcome = Outcome(base, folder / "runs" / "x" / "model", "")
    given = ["--model", base, "--data", data, "--output", folder / "runs", "--rank", RANK, *SHORT, *options]
    code, outcome.said = _run("finetune", *given)
    if code == 0:
        report = json.loads((outcome.model.parent / "report.json").read_text())
        outcome.share = report["covered_share"]
        outcome.delta = _delta(outcome, folder)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _delta(outcome: Outcome, folder: Path) -> str:
    """Make and apply the delta of a run; return "same bits", or what went wrong."""
    delta, tuned = folder / "x.delta", folder / "tuned"
    for arguments in (
        ("make", outcome.model, delta, "--base", outcome.base),
        ("apply", "--base", outcome.base, delta, tuned),
    ):
        code, said = _run("delta", *arguments)
        if code:
            return said.strip().splitlines()[-1]
    expected, actual = weights_of(outcome.model), weights_of(tuned)
    if expected.keys() != actual.keys():
        return f"names differ: {sorted(expected.keys() ^ actual.keys())[:2]}"
    differing = [name for name in expected if not torch.equal(bits(expected[name]), bits(actual[name]))]
    return f"bits of {differing} differ" if differing else "same bits"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model directory, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _run(*arguments: object) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command([str(argument) for argument in arguments])
    return code, said.getvalue()


def main() -> int:
    """Print a table of the runs; return how many of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", default=list(ARCHITECTURES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of the base")
    parser.add_argument("--options", default="", help="further options of finetune, separated by spaces")
    parser.add_argument("--verbose", action="store_true", help="print what each run says")
    given = parser.parse_args()
    failed = 0
    print(f"{'architecture':<14}{'matrices trained':>17}{'seconds':>9}  delta")
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            base = save_architecture(name, Path(folder) / "base", getattr(torch, given.dtype))
            outcome = fine_tune(base, Path(folder), *given.options.split())
        failed += outcome.delta != "same bits"
        last = outcome.delta if outcome.share else outcome.said.strip().splitlines()[-1]
        print(f"{name:<14}{outcome.share:>17.1%}{outcome.seconds:>9.1f}  {last}", flush=True)
        if given.verbose:
            print(outcome.said)
    return failed


if __name__ == "__main__":
    sys.exit(main())
