"""Fine-tuning under torchrun and accelerate launch; a killed rank changes no bit of the result."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.bits import HANG_S
from helpers.tiny_llama import save_tiny

STEPS = 40
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3"]
ALONE = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)


@contextlib.contextmanager
def started(launchers: list[list[str]], tiny: Path, output: Path, *more: str) -> Iterator[list[subprocess.Popen]]:
    """Start one run by these launchers, one a node, and end them at last."""
    options = f"--model {tiny} --output {output} --device cpu --parallel ddp --steps {STEPS} --eval-problems 2".split()
    options += "--rank 4 --density 0.2 --refresh-interval 3 --lr 5e-3 --save-steps 1".split()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = ["-m", "lift_kernels", "finetune", *options, *more]
    processes = [subprocess.Popen([*start, *command], env=environment, **said) for start in launchers]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()  # A launcher ends its workers then.
            process.communicate()


def to_the_end(processes: list[subprocess.Popen]) -> str:
    """Wait until all launchers have ended well, and return what they said."""
    said = [process.communicate(timeout=HANG_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return "\n".join(said)


def assert_same_result(actual: Path, expected: Path) -> None:
    for file in ("model/model.safetensors", "answers.jsonl"):
        assert (actual / file).read_bytes() == (expected / file).read_bytes(), file
    a, e = (json.loads((folder / "report.json").read_text()) for folder in (actual, expected))
    changing = ("seconds", "settings.output", "settings.name")
    assert all(a[key] == value for key, value in e.items() if not key.startswith(changing))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The folder of a run by torchrun."""
    output = tmp_path_factory.mktemp("undisturbed")
    with started([ALONE], tiny, output) as processes:
        said = to_the_end(processes)
    [folder] = output.iterdir()
    assert said.count("] loading the model\n") == 1 == said.count("written to")
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl",
        "loss.png",
        "model",
        "report.json",
        "settings.json",
    ]
    return folder


def workers_of(launchers: list[subprocess.Popen]) -> list[int]:
    """The process ids of the ranks that these launchers have started, and that still run."""
    agents, found = {str(launcher.pid) for launcher in launchers}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has ended.
            state, parent, *_ = (folder / "stat").read_text().rpartition(") ")[2].split()
            if parent in agents and state != "Z" and b"lift_kernels" in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_a_rank(launchers: list[subprocess.Popen], folder: Path, chance: random.Random) -> bool:
    """Kill a random rank after a random number of checkpoints; return whether one was training."""
    seen: set[int] = set()
    wanted = chance.randrange(1, STEPS // 2)
    deadline = time.monotonic() + HANG_S
    while len(seen) < wanted and not list(folder.glob("*/report.json")):
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers)
        with contextlib.suppress(FileNotFoundError):  # A checkpoint is just replaced.
            seen |= {path.stat().st_mtime_ns for path in folder.glob("*/checkpoint.safetensors")}
        time.sleep(0.002)
    ranks = workers_of(launchers)
    with contextlib.suppress(ProcessLookupError):
        if len(ranks) == 2 and not list(folder.glob("*/report.json")):
            os.kill(chance.choice(ranks), signal.SIGKILL)
            return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_nodes() -> list[list[str]]:
    """Two launchers that meet as two nodes."""
    node = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    return [[*TORCHRUN, *node, "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [[], ["--name", "mine"]], ids=["unnamed", "named"])
def test_a_killed_rank_changes_no_bit(tiny, tmp_path, undisturbed, name):
    survive_a_kill([ALONE], tiny, tmp_path, undisturbed, *name)


@pytest.mark.slow
def test_a_killed_rank_on_one_of_two_nodes_changes_no_bit(tiny, tmp_path, undisturbed):
    survive_a_kill(two_nodes(), tiny, tmp_path, undisturbed)


def survive_a_kill(launchers: list[list[str]], tiny: Path, output: Path, expected: Path, *more: str) -> None:
    """Kill a rank once; the launchers start again, and the run goes on in its folder."""
    chance = random.Random(os.urandom(8))
    while True:
        with started(launchers, tiny, output, *more) as processes:
            killed = kill_a_rank(processes, output, chance)
            said = to_the_end(processes)
        if killed:
            break
        shutil.rmtree(output)  # It ended before the kill.
    assert said.count("resuming after step ") == 1, said
    [folder] = output.iterdir()
    assert_same_result(folder, expected)


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_bits(tiny, tmp_path, undisturbed):
    with started([ACCELERATE], tiny, tmp_path, "--name", "accelerate") as processes:
        to_the_end(processes)
    assert_same_result(tmp_path / "accelerate", undisturbed)
