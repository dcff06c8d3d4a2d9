"""trained_entries_hook where other optimizers, refreshes by hand and loaded states come between."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

WORKER = """
import copy
from lift_kernels import trained_entries_hook
join()
MASK = dict(rank=3, density=0.1)
found = {}

def make(hook, model=None, parallel=None, group=dist.group.WORLD, **options):
    model = model or build()
    optimizer = LiftAdamW(lift_param_groups(model, freeze_rest=True), lr=0.05, process_group=group, **MASK | options)
    if parallel is None:
        parallel = DistributedDataParallel(model, process_group=None if group == "independent" else group)
        if hook:
            parallel.register_comm_hook(optimizer, trained_entries_hook)
    return model, parallel, optimizer

def steps(parallel, optimizer, numbers):
    for number in numbers:
        backward(parallel, number)
        optimizer.step()
        optimizer.zero_grad()

def weights(model):
    return [p.detach().clone() for p in model.parameters()]

def error_of(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""

# Another LiftAdamW takes the parameters. The hook stays with the first one.
for hook in (True, False):
    model, parallel, optimizer = make(hook)
    steps(parallel, optimizer, range(3))
    _, _, second = make(hook, model, parallel, density=0.3)
    steps(parallel, second, range(3, 6))
    found["second optimizer", hook] = weights(model)

# A refresh by hand, with a gradient of the old entries, and without one.
model, parallel, optimizer = make(True)
steps(parallel, optimizer, range(2))
backward(parallel, 2)
before = copy.deepcopy(optimizer.state_dict())
found["refresh in between"] = error_of(optimizer.refresh)
for was, now in zip(before["state"].values(), optimizer.state_dict()["state"].values()):
    assert all(torch.equal(was[key], now[key]) for key in was)
optimizer.step()
found["refresh after the step"] = error_of(optimizer.refresh)
backward(parallel, 3)
found["dropped"] = error_of(lambda: optimizer.refresh(drop_gradients=True)), [p.grad for p in model.parameters()]
backward(parallel, 4)
optimizer.load_state_dict(optimizer.state_dict())
found["loaded"] = [p.grad for p in model.parameters()]

# Only one rank has loaded a state, which is seen before gradients are mixed.
saved, trained = copy.deepcopy(model.state_dict()), optimizer.state_dict()
model, parallel, optimizer = make(True)
model.load_state_dict(saved)
if rank == 0:
    optimizer.load_state_dict(trained)
found["loaded on one rank"] = error_of(lambda: backward(parallel, 5))

# A group of this rank alone, which must not be mixed with the others.
own = [dist.new_group([r]) for r in range(world)][rank]
model, parallel, optimizer = make(True, group=own)
steps(parallel, optimizer, range(3))
found["own group"] = weights(model)
alone, _, optimizer = make(False, group="independent", parallel=False)
steps(alone, optimizer, range(3))
found["alone"] = weights(alone)

# The process group ends, and another one begins.
model, parallel, optimizer = make(False)
steps(parallel, optimizer, range(2))
dist.destroy_process_group()
dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=world)
found["another life"] = error_of(optimizer.refresh)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_a_second_optimizer_trains_all_of_its_entries(ranks):
    """It gets whole averages, so its training is that without the hook."""
    for found in ranks:
        assert all(map(torch.equal, found["second optimizer", True], found["second optimizer", False]))


@pytest.mark.slow
def test_a_refresh_before_the_step_is_refused(ranks):
    for found in ranks:
        said = found["refresh in between"]
        assert said.startswith("RuntimeError: 0.weight has a gradient of which trained_entries_hook has averaged")
        assert "refresh after step() and zero_grad(), or by refresh(drop_gradients=True)" in said
        assert found["refresh after the step"] == ""


@pytest.mark.slow
def test_gradients_of_old_entries_are_dropped(ranks):
    for found in ranks:
        assert found["dropped"] == ("", [None] * 4) and found["loaded"] == [None] * 4


@pytest.mark.slow
def test_a_state_that_one_rank_has_loaded_is_an_error_of_both(ranks):
    for found in ranks:
        assert "only rank 0 trains entries of 0.weight and 1 more, not rank 1" in found["loaded on one rank"]


@pytest.mark.slow
def test_a_group_of_one_rank_is_left_alone(ranks):
    for found in ranks:
        assert all(map(torch.equal, found["own group"], found["alone"]))
    assert not torch.equal(ranks[0]["alone"][0], ranks[1]["alone"][0])


@pytest.mark.slow
def test_an_optimizer_outlives_its_process_group(ranks):
    assert [found["another life"] for found in ranks] == ["", ""]
