"""Packed gradients under DistributedDataParallel: the training of one process with all data."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

MODES = {
    "plain": {},
    "no_sync": {"micro": 3},
    "static graph": {"ddp": {"static_graph": True}},
    "bucket view": {"ddp": {"gradient_as_bucket_view": True}},
    "unused on one rank": {"ddp": {"find_unused_parameters": True}, "unused": (1,)},
    "unused on all ranks": {"ddp": {"find_unused_parameters": True}, "unused": (0, 1)},
    "many buckets": {"ddp": {"bucket_cap_mb": 0.001}},
    "bf16": {"dtype": torch.bfloat16},
    "spread": {"options": {"refresh_schedule": "spread"}},
    "drift": {"options": {"refresh_drift": 0.02}},
    "norm": {"options": {"max_grad_norm": 0.01}},
    "small state": {
        "dtype": torch.bfloat16,
        "grad_dtype": torch.bfloat16,
        "options": {"state_dtype": "8bit", "master": "split"},
    },
    "small state, no_sync": {"micro": 2, "grad_dtype": torch.bfloat16, "options": {"state_dtype": "8bit"}},
}
WORKER = (
    f"MODES = {MODES!r}\n"
    + """
import contextlib
join()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.side, self.out = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 6)

    def forward(self, x, unused=False):
        h = torch.tanh(self.a(x))
        return self.out(h if unused else h + torch.tanh(self.side(h)))

MASK = dict(rank=3, density=0.2)

def make(group, dtype=torch.float32, grad_dtype=torch.float32, options={}, **ignored):
    model = Net().to(dtype)
    groups = pack_gradients(model, freeze_rest=True, process_group=group, grad_dtype=grad_dtype, **MASK)
    return model, LiftAdamW(groups, lr=0.01, refresh_interval=3, process_group=group, **MASK | options)

def losses(model, step, rank, micro=1, unused=(), **ignored):
    for part in range(micro):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(10 * step + part))[rank]
        skip = {"unused": True} if rank in unused and step % 2 == 1 else {}
        yield model(x.to(model_dtype(model)), **skip).square().mean()

def model_dtype(model):
    return next(p.dtype for name, p in model.named_parameters() if name.endswith("weight"))

def result(model, optimizer):
    # `values` is NaN where the optimizer stores them.
    return [p.detach().nan_to_num(7.0) for p in model.parameters()], [
        entry["indices"].clone() for entry in optimizer.state.values() if "indices" in entry]

def together(ddp={}, micro=1, **case):
    model, optimizer = make(dist.group.WORLD, **case)
    parallel = DistributedDataParallel(model, **ddp)
    for step in range(10):
        parts = losses(parallel, step, rank, micro, **case)
        for part in range(micro):
            with contextlib.nullcontext() if part == micro - 1 else parallel.no_sync():
                next(parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)

def alone(ddp={}, micro=1, **case):
    model, optimizer = make("independent", **case)
    for step in range(10):
        sums = {}
        for of_rank in range(2):
            for loss in losses(model, step, of_rank, micro, **case):
                loss.backward()
            for p in model.parameters():
                if p.grad is not None:
                    sums[p] = sums.get(p, 0) + p.grad / 2
                p.grad = None
        for p, total in sums.items():
            p.grad = total
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)

torch.save({name: (together(**case), alone(**case)) for name, case in MODES.items()}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By rank and mode: weights and index lists of the ranks together, and of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_like_one_process(ranks, mode):
    """To the bit: a sum of two halves has one order."""
    (first, alone), (second, _) = ranks[0][mode], ranks[1][mode]
    for other in (second, alone):
        for ours, theirs in zip(first, other, strict=True):  # weights, then index lists
            assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
