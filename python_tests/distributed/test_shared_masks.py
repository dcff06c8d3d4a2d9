"""Ranks of a process group make masks together: each a part, and all get those of one process."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

WORKER = """
group = None
kinds = ("principal", "off_principal", "magnitude", "random", "gradient")
if world > 1:
    join()
    group = dist.group.WORLD
from lift_kernels.masks import selection as selection_module

made = []  # names of the matrices whose masks this rank has made
masks_here = selection_module._masks
selection_module._masks = lambda parts, *rest, **more: (
    made.extend(part.name for part in parts), masks_here(parts, *rest, **more))[1]

def together(model, step):
    "All ranks' data at once, where there is one process alone."
    x = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(step))
    x = x.view(3, 10, 12)[rank] if world == 3 else x.view(2, 15, 12)[rank] if world == 2 else x.view(30, 12)
    model(x).square().mean().backward()

def train(mode, selection, steps, warm_start="device"):
    made.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 6))
    torch.manual_seed(100 + rank)  # The seed of a rank must not matter.
    options = dict(rank=3, density=0.2)
    where = dict(process_group=group)
    if mode == "packed":
        if selection == "gradient":
            together(model, 99)
            for p in model.parameters():
                if world > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= world
        groups = pack_gradients(model, freeze_rest=True, selection=selection, **options, **where)
    else:
        groups = lift_param_groups(model, freeze_rest=True)
    parallel = DistributedDataParallel(model) if world > 1 else model
    interval = None if (mode, selection) == ("packed", "gradient") else 10
    optimizer = LiftAdamW(groups, lr=0.01, refresh_interval=interval, selection=selection, warm_start=warm_start,
                          **options, **where)
    lists, first = [], len(made)
    for step in range(steps):
        together(parallel, step)
        optimizer.step()
        parallel.zero_grad()
        lists.append([entry["indices"].clone() for entry in optimizer.state.values()])
    weights = [model[i].weight.detach() for i in (0, 2, 4)]
    return lists, weights, list(made)

found = {(mode, kind): train(mode, kind, 30 if kind == "principal" else 12)
         for mode in ("matrix", "packed") for kind in kinds}
found["no bases"] = train("matrix", "principal", 12, warm_start=None)
torch.save(found, f"{folder}/{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Index lists of each step, weights at the end, and whose masks each rank made, by world."""
    results = {}
    for world in (1, 2, 3):
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(WORKER, world, folder)
        results[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return results


KINDS = ("principal", "off_principal", "magnitude", "random", "gradient")
CASES = [(mode, kind) for mode in ("matrix", "packed") for kind in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", [*CASES, "no bases"], ids=str)
def test_training_is_that_of_one_process(found, case, world):
    """Ranks are seeded differently, and see other parts of the data."""
    (alone,) = found[1]
    for of_rank in found[world]:
        for lists, expected in zip(of_rank[case][0], alone[case][0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(lists, expected, strict=True))
        for weight, expected in zip(of_rank[case][1], alone[case][1], strict=True):
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
        for weight, first in zip(of_rank[case][1], found[world][0][case][1]):
            assert torch.equal(weight, first)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_mask_is_made_once(found, case, world):
    (alone,) = found[1]
    by_rank = [of_rank[case][2] for of_rank in found[world]]
    assert sorted(name for names in by_rank for name in names) == sorted(alone[case][2])
    assert all(by_rank), "a rank made no mask"
