"""Which ranks share out the work on masks, and tensors of unequal sizes among them."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from lift_kernels.distributed.exchanges import Form, _packed, _unpacked
from lift_kernels.distributed.groups import data_parallel_group
from lift_kernels.distributed.replicas import Replicas

WORKER = """
import copy, io, os, pickle
from lift_kernels.distributed.exchanges import Form, gather_objects, gather_tensors
from lift_kernels.distributed.replicas import Replicas

assert Replicas().group is None and Replicas("independent").group is None
join()
everyone, pair = dist.group.WORLD, dist.new_group([2, 0])
found = {}

# Tensors: several dtypes, an empty one, none at all on a rank, a view, 0 dimensions.
def own_tensors(rank):
    if rank == 1:
        return []
    draw = torch.Generator().manual_seed(rank)
    wide = torch.randn(5 + rank, 8, generator=draw)
    return [torch.arange(3 + rank, dtype=torch.int32), torch.tensor(0.5 + rank), torch.zeros(0), wide.T[1:],
            wide.bfloat16()]

sent = []
broadcast = dist.broadcast
dist.broadcast = lambda tensor, src, **more: (sent.append((src, tensor.nbytes)), broadcast(tensor, src, **more))[1]
for label, group in (("everyone", everyone), ("pair", pair)):
    if rank in dist.get_process_group_ranks(group):
        forms = gather_objects([Form.of(t) for t in own_tensors(rank)], group)
        found[label] = gather_tensors(own_tensors(rank), forms, group, torch.device("cpu"))
        expected = [own_tensors(r) for r in dist.get_process_group_ranks(group)]
        assert len(found[label]) == len(expected)
        for theirs, right in zip(found[label], expected):
            assert len(theirs) == len(right)
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(theirs, right))
            # A received tensor does not hold the buffer.
            assert all(a.untyped_storage().nbytes() <= 2 * 4 * 7 * 8 for a in theirs)
assert [src for src, _ in sent[:2]] == [0, 2], sent  # Rank 1 has nothing to send.

# The group of copies: by reference is not possible, so the default group is found again by its ranks.
members = Replicas(everyone)
assert members.group is everyone
for copied in (copy.deepcopy(members), pickle.loads(pickle.dumps(members))):
    assert copied.group is everyone
if rank != 1:
    assert Replicas(pair).group is pair and copy.deepcopy(Replicas(pair)).group is None
assert Replicas().group is None  # Nobody has said that all ranks are replicas.

# accelerate says so.
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), ACCELERATE_USE_CPU="true",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == world, accelerator.state
assert Replicas().group is dist.group.WORLD and Replicas("independent").group is None

torch.manual_seed(rank)
model = build(seed=rank)
optimizer = LiftAdamW(lift_param_groups(model, freeze_rest=True), lr=0.1, rank=3, density=0.2, refresh_interval=2)
model, optimizer = accelerator.prepare(model, optimizer)
for step in range(3):
    x = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(step))
    accelerator.backward(model(x[rank]).square().mean())
    optimizer.step()
    optimizer.zero_grad()
torch.save([p.detach() for p in model.parameters()], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_groups_exchanges_and_accelerate(tmp_path):
    """Ranks that are seeded differently end equal under accelerate, which names no group."""
    run_ranks(WORKER, 3, tmp_path)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("kind", "shared"), [("MULTI_GPU", True), ("MULTI_CPU", True), ("FSDP", False), ("NO", False)])
def test_only_plain_data_parallel_runs_have_a_group(monkeypatch, kind, shared):
    state = SimpleNamespace(_shared_state={"distributed_type": SimpleNamespace(value=kind)})
    monkeypatch.setitem(sys.modules, "accelerate.state", SimpleNamespace(AcceleratorState=state))
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="all ranks"))
    assert data_parallel_group() == ("all ranks" if shared else None)


def test_an_accelerate_that_is_not_set_up_has_no_group(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "accelerate.state", SimpleNamespace(AcceleratorState=SimpleNamespace(_shared_state={}))
    )
    assert data_parallel_group() is None
    monkeypatch.delitem(sys.modules, "accelerate.state")
    assert data_parallel_group() is None and Replicas().group is None


def test_packed_bytes_are_unpacked_to_the_bit():
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int32), torch.randn(()), torch.zeros(0, 4).bfloat16()]
    views = _unpacked(_packed(tensors, torch.device("cpu")), [Form.of(t) for t in tensors])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(views, tensors, strict=True))
    assert all(view.data_ptr() % 16 == 0 for view in views if view.numel())
