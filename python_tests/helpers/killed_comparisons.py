"""Comparisons that are killed with SIGKILL at random points.

`test_compare_killed.py` starts this as a process. It imports everything once and forks a child for
each try.
"""

import random
import sys
from pathlib import Path

from helpers.comparison_runs import make_options, results
from helpers.finetune_runs import make_runs_cheap
from helpers.killed_children import forked, killed_after, to_the_end

from lift_kernels.finetune.comparison import picture
from lift_kernels.finetune.comparison.options import ROWS
from lift_kernels.finetune.comparison.session import TABLE, compare

KILLS = 6
METHODS = ("lift", "random@3e-3", "lora@3e-3")


def start(model: Path, output: Path) -> int:
    """Fork a child that begins the comparison or goes on with it, and return its process id."""
    return forked(lambda: compare(make_options(model, output, methods=METHODS, most_rates=3, seeds=2)))


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
