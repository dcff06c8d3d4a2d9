"""Ranks with a card each, connected by NCCL: they train what one process trains.

One card is one rank, whose collectives run all the same. Two cards are two ranks. The CPU runs the
same program with gloo.
"""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

WORKER = """
from lift_kernels import trained_entries_hook

device, backend = sys.argv[4:]
place = torch.device(device, rank) if device == "cuda" else torch.device(device)
if device == "cuda":
    torch.cuda.set_device(place)
dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=world)

def train(packed, parallel):
    model = build().to(place)
    group = dist.group.WORLD if parallel else "independent"
    mask = dict(rank=3, density=0.2, process_group=group)
    trained = pack_gradients(model, **mask) if packed else lift_param_groups(model)
    optimizer = LiftAdamW(trained, lr=0.01, refresh_interval=3, **mask)
    called = DistributedDataParallel(model) if parallel else model
    if parallel and not packed:
        called.register_comm_hook(optimizer, trained_entries_hook)
    for step in range(7):  # All ranks have the same data, so that means are exact.
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step)).to(place)
        called(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
    lists = [entry["indices"].cpu() for entry in optimizer.state.values() if "indices" in entry]
    return [p.detach().cpu() for p in model.parameters()], lists

for packed in (False, True):
    alone, together = (train(packed, parallel) for parallel in (False, True))
    for one, other in zip(alone, together):
        assert len(one) == len(other) > 1 and all(map(torch.equal, one, other)), packed
print("same bits")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "collectives"),
    [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)],
    ids=["cpu", "gpu"],
)
def test_ranks_train_what_one_process_trains(device, collectives, tmp_path):
    world = min(2, torch.cuda.device_count()) if device == "cuda" else 2
    outputs = run_ranks(WORKER, world, tmp_path, device, collectives)
    assert all("same bits" in output for output in outputs), outputs
