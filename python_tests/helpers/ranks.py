"""Several ranks of torch.distributed as processes on this machine, connected by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers.bits import HANG_S

ROOT = Path(__file__).parents[2]
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


def run_ranks(worker: str, world: int, folder: Path) -> list[str]:
    """Run ``world`` processes, check that each ends well, and return what each printed.

    ``worker`` is code that follows `PREAMBLE`.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + worker, str(rank), str(world), str(folder)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=HANG_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    return outputs
