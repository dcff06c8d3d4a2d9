"""DistributedDataParallel averages k values per packed matrix, and nothing else."""

from __future__ import annotations

import torch
from helpers.ranks import run_ranks
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups

WORKER = """
join()
model = build()
groups = pack_gradients(model, rank=3, density=0.2, freeze_rest=True)
entries = sum(p.numel() for _, p in groups[0]["params"])
sizes = []

def count(state, bucket):
    sizes.append(bucket.buffer().numel())
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

parallel = DistributedDataParallel(model)
parallel.register_comm_hook(None, count)
optimizer = LiftAdamW(groups, lr=0.1, refresh_interval=2)
for step in range(4):
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(step))
    parallel(x[rank]).square().mean().backward()
    optimizer.step()
    parallel.zero_grad()
assert sum(sizes) == 4 * entries, sizes
torch.save([p.detach() for p in (model[0].weight, model[2].weight)], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_ddp_averages_packed_gradients(tmp_path):
    """Two processes end with the weights that both halves of each batch give.

    The buckets hold k values.
    """
    run_ranks(WORKER, 2, tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    groups = lift_param_groups(model, freeze_rest=True)
    optimizer = LiftAdamW(groups, rank=3, density=0.2, lr=0.1, refresh_interval=2)
    for step in range(4):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(step))
        model(x.flatten(0, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for a, b, expected in zip(mine, theirs, (model[0].weight, model[2].weight)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected.detach(), rtol=0, atol=1e-5)
