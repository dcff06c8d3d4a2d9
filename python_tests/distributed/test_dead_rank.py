"""A rank that dies: the others stop with an error within the timeout of the process group."""

from __future__ import annotations

import pytest
from helpers.ranks import PREAMBLE, start_ranks, wait_for_all

WORKER = """
import os, signal
from datetime import timedelta
dies, where = int(sys.argv[4]), sys.argv[5]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
                        timeout=timedelta(seconds=5))
from lift_kernels.masks import together

def die(*anything, **more):
    os.kill(os.getpid(), signal.SIGKILL)

model = build()
optimizer = LiftAdamW(lift_param_groups(model), rank=3, density=0.2, process_group=dist.group.WORLD)
optimizer.refresh()
if rank == dies:
    if where == "before its plan":
        together.Replicas.agree = die
    else:
        together.gather_objects = die
try:
    optimizer.refresh()
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "where"), [(2, "before its plan"), (0, "while it makes masks")])
def test_the_others_stop_with_an_error(tmp_path, dies, where):
    processes = start_ranks(PREAMBLE + WORKER, 3, tmp_path, str(dies), where)
    wait_for_all(processes)
    for rank, process in enumerate(processes):
        said = (tmp_path / f"{rank}.log").read_text()
        assert process.returncode == (-9 if rank == dies else 3), said
        if rank != dies:
            assert "Error: " in said
            if where == "before its plan":
                assert (
                    f"rank {rank} makes masks of 0.weight and 1 more, and rank 2 of its process group did not come"
                    in said
                )
