"""Fine-tuning runs that are killed with SIGKILL at random points.

`test_finetune_resume.py` starts this as a process. It imports everything once and forks a child for
each run. It must start no OpenMP thread before its last fork.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from helpers.finetune_runs import assert_same_end, make_runs_cheap, make_settings

from lift_kernels.finetune import run_dir
from lift_kernels.finetune.run import run
from lift_kernels.finetune.run_dir import settings_of

RUNS, KILLS_EACH = 5, 2


def start(settings, folder: Path) -> int:
    """Fork a child that runs or resumes the job, and return its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if (folder / run_dir.SETTINGS).exists():
            run(settings_of(folder), resumed=True)
        else:  # killed before it had written its settings
            shutil.rmtree(folder, ignore_errors=True)
            run(settings)
        code = 0
    finally:
        os._exit(code)


def to_the_end(settings, folder: Path) -> float:
    """Run without interruption and return the seconds."""
    began = time.perf_counter()
    _, status = os.waitpid(start(settings, folder), 0)
    assert status == 0, "a run failed; run the same settings by hand to see why"
    return time.perf_counter() - began


def kill_at(settings, folder: Path, seconds: float) -> bool:
    """Run and kill after so many seconds; return whether the run was still going."""
    process = start(settings, folder)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # an ended child keeps its id until waitpid, so this hits no other process
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def main(model: Path, output: Path, seed: int) -> None:
    make_runs_cheap()
    rng = random.Random(seed)
    expected = output / "undisturbed"
    whole = to_the_end(make_settings(model, output, name="undisturbed"), expected)
    print(f"undisturbed: {whole:.2f} s")
    kills = 0
    for number in range(RUNS):
        settings = make_settings(model, output, name=f"killed{number}")
        folder = output / f"killed{number}"
        for _ in range(KILLS_EACH):
            share = rng.uniform(0.2, 0.95)
            while not kill_at(settings, folder, share * whole):
                assert (folder / run_dir.REPORT).exists()
                shutil.rmtree(folder)  # it ended before the kill
                share *= 0.7
            kills += 1
            left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
            print(f"run {number} killed at {share:.0%}; it left {', '.join(left) or 'nothing'}")
        to_the_end(settings, folder)
    for number in range(RUNS):
        assert_same_end(output / f"killed{number}", expected)
        assert not list((output / f"killed{number}").glob(".*"))
    print(f"{kills} kills, {RUNS} runs ended with the bits of the undisturbed one")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
