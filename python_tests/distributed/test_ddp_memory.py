"""Bytes of a trained entry under DistributedDataParallel with the smallest forms of state."""

from __future__ import annotations

import json

import pytest
from helpers.ranks import run_ranks

WORKER = """
import gc, json
join()

def live_bytes(skip):
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.layout == torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for address, size in storages.items() if address not in skip)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(768, 1024, bias=False), nn.Linear(1024, 512, bias=False)).bfloat16()
weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
base = live_bytes(weights)
options = dict(rank=4, density=0.1, process_group=dist.group.WORLD)
groups = pack_gradients(model, grad_dtype=torch.bfloat16, **options)
optimizer = LiftAdamW(groups, lr=1e-3, warm_start=None, state_dtype="8bit", master="split", **options)
parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
for step in range(3):
    parallel(torch.randn(4, 768).bfloat16()).float().square().mean().backward()
    if step < 2:
        optimizer.step()
        optimizer.zero_grad()
entries = sum(layer.indices.numel() for layer in model)
again = DistributedDataParallel(model)  # it writes into `values` when it is constructed
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump((live_bytes(weights) - base) / entries, file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_entry_takes_at_most_12_bytes_and_its_scales(tmp_path):
    """Index 4, gradient 2, low half 2, moments 2.25, and 2 of `values` for the wrapper."""
    run_ranks(WORKER, 2, tmp_path)
    for rank in range(2):
        assert 12.2 < json.loads((tmp_path / f"{rank}.json").read_text()) <= 12.3
