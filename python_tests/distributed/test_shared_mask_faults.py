"""Ranks of a group that differ: an error on every rank that names it, and nothing is changed."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

WORKER = """
import copy, math
from lift_kernels.masks import selection as selection_module
join()
world_group = dist.group.WORLD
options = dict(rank=3, density=0.2)
loss = lambda model, x: model(x).square().mean()

def net(hidden=20, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, hidden), nn.Tanh(), nn.Linear(hidden, 16), nn.Tanh(), nn.Linear(16, 6))

def gradients(model):
    loss(model, torch.randn(5, 12, generator=torch.Generator().manual_seed(0))).backward()

def said_by(act, *things):
    "What an act raises, after a check that it has changed none of the things."
    before = [{key: value.clone() for key, value in thing.state_dict().items()} for thing in things]
    try:
        act()
    except Exception as error:
        for thing, was in zip(things, before):
            now = thing.state_dict()
            assert was.keys() == now.keys() and all(
                torch.equal(torch.nan_to_num(was[key]), torch.nan_to_num(now[key])) for key in was), "something changed"
            assert not any("indices" in entry for entry in getattr(thing, "state", {}).values())
        return f"{type(error).__name__}: {error}"
    return ""

def matrix_mode(model, groups=None, **more):
    optimizer = LiftAdamW(groups or lift_param_groups(model, freeze_rest=True), lr=0.1, process_group=world_group,
                          **{**options, **more})
    gradients(model)
    return said_by(optimizer.step, model)

def packed_mode(model, **more):
    said = said_by(lambda: pack_gradients(model, process_group=world_group, **{**options, **more}), model)
    assert not said or all(type(module) is nn.Linear for module in model if hasattr(module, "weight"))
    return said

odd = rank == 1
found = {}
for name, mode in (("matrix", matrix_mode), ("packed", packed_mode)):
    found[name, "shape"] = mode(net(hidden=24 if odd else 20))
    found[name, "rank"] = mode(net(), rank=2 if odd else 3)
    found[name, "density"] = mode(net(), density=0.3 if odd else 0.2)
    found[name, "seed"] = mode(net(), seed=int(odd))
    found[name, "selection"] = mode(net(), selection="magnitude" if odd else "random")
    found[name, "weights"] = mode(net(seed=rank))
    nan = net()
    nan[2].weight.data[3, 4] = math.nan
    found[name, "nan"] = mode(nan)

    principal_masks = selection_module.principal_masks

    def fails_on_one(requests, **more):
        if any(request.weight.shape == (16, 20) for request in requests):  # on the rank that this matrix falls to
            raise MemoryError("no room")
        return principal_masks(requests, **more)

    selection_module.principal_masks = fails_on_one
    found[name, "memory"] = mode(net())
    selection_module.principal_masks = principal_masks

    calls = []

    def counting(weight, k):  # Every rank calls it for every matrix.
        calls.append(weight.shape)
        return torch.arange(k, dtype=torch.int32)

    found[name, "callable"] = mode(net(), selection=counting), len(calls)
found["packed", "names"] = packed_mode(net(), exclude="4" if odd else None)
model = net()
model[4].weight.requires_grad_(not odd)
found["matrix", "names"] = matrix_mode(model, lift_param_groups(model, exclude="4" if odd else None))

# One rank has loaded a state, the others have not.
saved = net()
trained = LiftAdamW(lift_param_groups(saved), process_group="independent", **options)
gradients(saved)
trained.step()
model = copy.deepcopy(saved)
optimizer = LiftAdamW(lift_param_groups(model), process_group=world_group, **options)
if odd:
    optimizer.load_state_dict(trained.state_dict())
gradients(model)
found["matrix", "loaded on one"] = said_by(optimizer.step, model)

# All have loaded it, one of them into other weights.
model = net(seed=5) if odd else copy.deepcopy(saved)
optimizer = LiftAdamW(lift_param_groups(model), process_group=world_group, **options)
optimizer.load_state_dict(trained.state_dict())
gradients(model)
before = [p.detach().clone() for p in model.parameters()]
try:
    optimizer.step()
except RuntimeError as error:
    found["matrix", "loaded into other weights"] = f"RuntimeError: {error}"
assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before))

# One rank decides that its masks have drifted.
model = net()
optimizer = LiftAdamW(lift_param_groups(model), lr=1e-4, refresh_interval=2, refresh_drift=0.2,
                      process_group=world_group, **options)
for step in range(2):
    gradients(model)
    if odd and step == 1:
        for ref in optimizer._table.refs:
            ref.drift["drift_rate"].fill_(1e9)
    try:
        optimizer.step()
    except RuntimeError as error:
        found["matrix", "drift"] = f"RuntimeError: {error}"

# Weights that DistributedDataParallel does not broadcast, with masks that do not depend on them.
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.experts)

torch.manual_seed(rank)
model = Experts()
groups = pack_gradients(model, extra="experts", selection="random", **options)
optimizer = LiftAdamW(groups, selection="random", process_group=world_group, **options)
model(torch.ones(2, 8)).sum().backward()
found["packed", "hooked weights"] = said_by(optimizer.step, model)

# What rank 0 does alone needs no other rank.
model = net()
groups = pack_gradients(model, process_group=world_group, **options)
optimizer = LiftAdamW(groups, lr=0.1, refresh_interval=2, process_group=world_group, **options)
if rank == 0:
    copies = optimizer.state_dict(), copy.deepcopy(optimizer)
for step in range(3):
    gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        copies = optimizer.state_dict(), copy.deepcopy(optimizer)
torch.save((found, model.state_dict()), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of three ranks raised, by mode and case, and the weights of the last case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, 3, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


BOTH = {  # on every rank
    "shape": ("RuntimeError: shape of 0.weight", "(20, 12) on rank 0 and (24, 12) on rank 1"),
    "rank": ("RuntimeError: rank of 0.weight and of 2 more matrices is 3 on rank 0 and 2 on rank 1", "same model"),
    "density": ("RuntimeError: number of trained entries of 0.weight", "is 48 on rank 0 and 72 on rank 1"),
    "seed": ("RuntimeError: seed is 0 on rank 0 and 1 on rank 1", "same model and options"),
    "selection": ("RuntimeError: selection is 'random' on rank 0 and 'magnitude' on rank 1",),
    "weights": ("RuntimeError: ranks 0 and 1 hold different weights of 0.weight and of 2 more", "broadcast rank 0's"),
    "names": ("RuntimeError: only rank 0 makes masks of 4.weight, not rank 1", "same model and options"),
}
CASES = [(mode, case, parts) for mode in ("matrix", "packed") for case, parts in BOTH.items()]
CASES += [
    ("matrix", "loaded on one", ("RuntimeError: rank 0 makes masks while rank 1 has loaded a state",)),
    ("matrix", "drift", ("RuntimeError: only rank 1 makes masks of 0.weight and 2 more, not rank 0",)),
    ("packed", "hooked weights", ("RuntimeError: ranks 0 and 1 hold different weights of experts",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "case", "parts"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_difference_is_an_error_of_every_rank(found, mode, case, parts):
    said = [of_rank[mode, case] for of_rank, _ in found]
    assert said[0] == said[1] == said[2] and all(part in said[0] for part in parts), said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [("nan", "ValueError", "2.weight"), ("memory", "", "no room")],
)
def test_an_error_on_the_rank_that_makes_a_mask_reaches_all(found, mode, case, kind, words):
    said = [of_rank[mode, case] for of_rank, _ in found]
    assert all(words in text and text.startswith(kind) for text in said), said
    assert sum(": rank " in text for text in said) == 2, "the other two say which rank it was"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_every_rank_calls_a_callable_for_every_matrix(found, mode):
    assert [of_rank[mode, "callable"] for of_rank, _ in found] == [("", 3)] * 3


@pytest.mark.slow
def test_weights_of_another_checkpoint_on_one_rank_stop_all(found):
    said = [of_rank["matrix", "loaded into other weights"] for of_rank, _ in found]
    assert said[1].startswith("RuntimeError: the optimizer's state was saved with other weights")
    assert said[0] == said[2] and said[0].startswith("RuntimeError: rank 1 cannot go on: the optimizer's state was")


@pytest.mark.slow
def test_copies_that_one_rank_makes_need_no_other(found):
    for _, weights in found:
        assert all(torch.equal(weights[key], found[0][1][key]) for key in weights)
