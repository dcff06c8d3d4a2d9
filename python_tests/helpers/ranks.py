"""Several ranks of torch.distributed as processes on this machine, connected by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from helpers.bits import HANG_S

ROOT = Path(__file__).parents[2]
NOTICE_S = 30.0
"""For the other ranks, when one has failed."""
PREAMBLE = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)

def join():
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)

def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))

def backward(model, step, rank=rank):
    x = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(step))
    model(x[rank]).square().mean().backward()
"""


def run_ranks(worker: str, world: int, folder: Path, *arguments: str) -> list[str]:
    """Run ``world`` processes, check that each ends well, and return what each printed.

    ``worker`` is code that follows `PREAMBLE`. It finds the arguments in sys.argv[4:].
    """
    processes = start_ranks(PREAMBLE + worker, world, folder, *arguments)
    try:
        wait_for_all(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = [(folder / f"{rank}.log").read_text() for rank in range(world)]
    failed = [output for process, output in zip(processes, outputs) if process.returncode > 0]
    assert not failed, failed[0]
    assert all(process.returncode == 0 for process in processes), outputs
    return outputs


def start_ranks(program: str, world: int, folder: Path, *arguments: str) -> list[subprocess.Popen]:
    """Start ``world`` processes, whose output goes to ``folder/RANK.log``.

    The program finds its rank, ``world``, ``folder`` and the arguments in sys.argv.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    processes = []
    for rank in range(world):
        command = [sys.executable, "-c", program, str(rank), str(world), str(folder), *arguments]
        with (folder / f"{rank}.log").open("w") as output:
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return processes


def wait_for_all(processes: list[subprocess.Popen]) -> None:
    """Wait until all processes have ended, or one has failed and the others had time to notice."""
    deadline = time.monotonic() + HANG_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() for process in processes):  # The others may wait for it in vain.
            deadline = min(deadline, time.monotonic() + NOTICE_S)
        time.sleep(0.02)
