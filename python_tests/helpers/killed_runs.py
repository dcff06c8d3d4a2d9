"""Fine-tuning runs that are killed with SIGKILL at random points.

`test_finetune_resume.py` starts this as a process. It imports everything once and forks a child for
each run.
"""

import random
import shutil
import sys
from pathlib import Path

from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings
from helpers.killed_children import forked, killed_after, to_the_end

from lift_kernels.finetune import run_dir
from lift_kernels.finetune.run import run
from lift_kernels.finetune.run_dir import settings_of

RUNS, KILLS_EACH = 5, 2


def start(settings, folder: Path) -> int:
    """Fork a child that runs or resumes the job, and return its process id."""

    def work() -> None:
        if (folder / run_dir.SETTINGS).exists():
            run(settings_of(folder), resumed=True)
        else:  # killed before it had written its settings
            shutil.rmtree(folder, ignore_errors=True)
            run(settings)

    return forked(work)


def main(model: Path, output: Path, seed: int) -> None:
    make_runs_cheap()
    rng = random.Random(seed)
    expected = output / "undisturbed"
    whole = to_the_end(start(make_settings(model, output, name="undisturbed"), expected))
    print(f"undisturbed: {whole:.2f} s")
    kills = 0
    for number in range(RUNS):
        settings = make_settings(model, output, name=f"killed{number}")
        folder = output / f"killed{number}"
        for _ in range(KILLS_EACH):
            share = rng.uniform(0.2, 0.95)
            while not killed_after(start(settings, folder), share * whole):
                assert (folder / run_dir.REPORT).exists()
                shutil.rmtree(folder)  # it ended before the kill
                share *= 0.7
            kills += 1
            left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            print(f"run {number} killed at {share:.0%}; it left {', '.join(left) or 'nothing'}")
        to_the_end(start(settings, folder))
    for number in range(RUNS):
        assert_same_end(output / f"killed{number}", expected)
        assert not list((output / f"killed{number}").glob(".*"))
    print(f"{kills} kills, {RUNS} runs ended with the bits of the undisturbed one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
