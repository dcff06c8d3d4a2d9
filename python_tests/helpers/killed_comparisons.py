"""Comparisons that are killed with SIGKILL at random points.

`test_compare_killed.py` starts this as a process. It imports everything once and forks a child for
each try. It must start no OpenMP thread before its last fork.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from helpers.comparison_runs import make_options, results
from helpers.finetune_runs import make_runs_cheap

from lift_kernels.finetune.comparison import picture
from lift_kernels.finetune.comparison.options import ROWS
from lift_kernels.finetune.comparison.session import TABLE, compare

KILLS = 6
METHODS = ("lift", "random@3e-3", "lora@3e-3")


def start(model: Path, output: Path) -> int:
    """Fork a child that begins the comparison or goes on with it, and return its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        compare(make_options(model, output, methods=METHODS, most_rates=3, seeds=2))
        code = 0
    finally:
        os._exit(code)


def to_the_end(process: int) -> float:
    """Wait for a child and return the seconds."""
    began = time.perf_counter()
    _, status = os.waitpid(process, 0)
    assert status == 0, "a comparison failed; run the same options by hand to see why"
    return time.perf_counter() - began


def killed_after(process: int, seconds: float) -> bool:
    """Kill a child after so many seconds; return whether it was still going."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # an ended child keeps its id until waitpid, so this hits no other process
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def main(model: Path, output: Path, seed: int) -> None:
    make_runs_cheap()
    picture.draw = lambda *arguments: None
    rng = random.Random(seed)
    expected, killed = output / "undisturbed", output / "killed"
    whole = to_the_end(start(model, expected))
    print(f"undisturbed: {whole:.2f} s")
    kills = 0
    for _ in range(KILLS):
        if killed_after(start(model, killed), rng.uniform(0.1, 0.5) * whole):
            kills += 1
        found = results(killed) if (killed / ROWS).exists() else []
        assert found == results(expected)[: len(found)]
        print(f"killed with {len(found)} rows")
    to_the_end(start(model, killed))
    assert results(killed) == results(expected)
    assert without_seconds(killed / TABLE) == without_seconds(expected / TABLE)
    assert not list(killed.glob(".*"))
    print(f"{kills} kills, and the rows and the table of the undisturbed comparison")


def without_seconds(path: Path) -> list[str]:
    """The lines of a table without the last column, which holds seconds."""
    return [line.rpartition(" | ")[0] for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
