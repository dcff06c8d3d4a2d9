"""Command line: ``make fuzz ARGS="--first 0 --number 1000"``, or ``--seed 123`` for one."""

from __future__ import annotations

import argparse
import collections
import logging
import sys

import torch

from .combination import draw
from .outcome import failure, outcome, shrunk

parser = argparse.ArgumentParser(prog="make fuzz", description="Drawn combinations train right or are refused well.")
parser.add_argument("--seed", type=int, help="run this one, shrink it where it fails, and show its traceback")
parser.add_argument("--first", type=int, default=0, help="first seed")
parser.add_argument("--number", type=int, default=1000, help="how many seeds")
parser.add_argument("--stop", type=int, default=10**9, help="stop after so many failures")
parser.add_argument("--refusals", action="store_true", help="show what was refused, and how")
options = parser.parse_args()
torch.set_num_threads(1)  # Threads take longer than these sizes.
logging.disable(logging.WARNING)  # Warnings of the package are right and many.

if options.seed is not None:
    c = draw(options.seed)
    print(c)
    if failure(c):
        c = shrunk(c)
        print("the simplest that fails alike:", c, sep="\n")
    print(outcome(c))
    sys.exit()
counts: collections.Counter[str] = collections.Counter()
for seed in range(options.first, options.first + options.number):
    try:
        result = outcome(draw(seed))
    except Exception as error:
        result = f"FAILED: {type(error).__name__}: {error}"
    kind = result.split(":")[0]
    counts[kind] += 1
    if kind == "FAILED" or kind == "refused" and options.refusals:
        print(seed, result[:300], flush=True)
    if counts["FAILED"] >= options.stop:
        break
print(", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
sys.exit(1 if counts["FAILED"] else 0)
