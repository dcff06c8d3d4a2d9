"""What each of three ranks does, sends and keeps in a refresh of twenty unequal matrices."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

WORKER = """
import gc, time
from torch.utils.flop_counter import FlopCounterMode
from lift_kernels.masks import principal, selection

if world > 1:
    join()
group = dist.group.WORLD if world > 1 else None
principal._SMALL = 0  # A worker thread would count no flops.
work = 0.0

eigh = torch.linalg.eigh

def counted_eigh(matrices):
    global work
    work += 12.0 * matrices.shape[-1] ** 3 * matrices.shape[:-2].numel()  # as in masks/costs.py
    return eigh(matrices)

torch.linalg.eigh = counted_eigh
masks_here = selection._masks

def counted_masks(parts, *rest, **more):
    global work
    with FlopCounterMode(display=False) as flops:
        masks = masks_here(parts, *rest, **more)
    # FlopCounterMode does not know lowrank_topk, which forms the product of the factors.
    work += flops.get_total_flops() + sum(2.0 * part.matrix.numel() * part.rank for part in parts)
    return masks

selection._masks = counted_masks
sent = {}
broadcast = dist.broadcast

def counted_broadcast(tensor, src, **more):
    sent[src] = sent.get(src, 0) + tensor.nbytes
    return broadcast(tensor, src, **more)

dist.broadcast = counted_broadcast
draw = torch.Generator().manual_seed(0)
sides = torch.randint(40, 640, (20, 2), generator=draw).tolist()
weights = [(f"w{i}", nn.Parameter(torch.randn(m, n, generator=draw))) for i, (m, n) in enumerate(sides)]

def received():
    return sum(isinstance(t, torch.Tensor) and t.dtype == torch.uint8 and t.nbytes > 50_000  # not pickled objects
               for t in gc.get_objects())

def refreshes(warm_start):
    global work
    optimizer = LiftAdamW(weights, lr=0.01, rank=16, density=0.05, warm_start=warm_start, process_group=group)
    rows = []
    for _ in range(2):  # a cold one and, where bases are kept, a warm one
        work = 0.0
        sent.clear()
        optimizer.refresh()
        lists = [entry["indices"].clone() for entry in optimizer.state.values()]
        left = 1000
        while left and received():  # gloo's thread may hold a buffer for a moment.
            left -= 1
            time.sleep(0.01)
        kept = sum(t.nbytes for entry in optimizer.state.values() for key, t in entry.items()
                   if key in ("indices", "basis", "threshold"))
        shared = len({t.untyped_storage().data_ptr() for entry in optimizer.state.values()
                      for key, t in entry.items() if key in ("basis", "threshold")})
        bases = sum(key in entry for entry in optimizer.state.values() for key in ("basis", "threshold"))
        rows.append(dict(lists=lists, work=work, sent=dict(sent), kept=kept, buffers=received(),
                         alone=shared == bases, bytes=optimizer.state_bytes()))
    return rows

torch.save({warm: refreshes(warm) for warm in ("device", None)}, f"{folder}/{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = {}
    for world in (1, 3):
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(WORKER, world, folder)
        results[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return results


CASES = [("device", 0), ("device", 1), (None, 0), (None, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rank_does_much_more_than_its_share(found, case):
    warm, refresh = case
    alone = found[1][0][warm][refresh]["work"]
    work = [of_rank[warm][refresh]["work"] for of_rank in found[3]]
    assert sum(work) == pytest.approx(alone, rel=1e-9), "some mask was made twice, or otherwise"
    assert max(work) <= 1.2 * alone / 3, [w / alone for w in work]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_tensor_is_sent_once_and_only_if_it_is_kept(found, case):
    warm, refresh = case
    for of_rank in found[3]:
        row = of_rank[warm][refresh]
        assert row["sent"] == found[3][0][warm][refresh]["sent"], "ranks disagree on what was sent"
        # 20 lists, 20 thresholds and at most 20 bases, each padded to 16 bytes.
        assert row["kept"] <= sum(row["sent"].values()) < row["kept"] + 60 * 16


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_kept_that_one_process_would_not_keep(found, case):
    warm, refresh = case
    alone = found[1][0][warm][refresh]
    for of_rank in found[3]:
        row = of_rank[warm][refresh]
        assert row["buffers"] == 0 and row["alone"], "a received buffer stays in memory"
        assert row["bytes"] == alone["bytes"]
        assert all(torch.equal(a, b) for a, b in zip(row["lists"], alone["lists"], strict=True))
