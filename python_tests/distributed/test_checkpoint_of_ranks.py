"""A state that two ranks saved by torch.distributed.checkpoint goes on with any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks

CASES = [("matrix", False), ("matrix", True), ("packed", True)]
COMMON = f"""
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch.distributed.checkpoint as dcp
from helpers.expert_model import STEPS, build, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

def cases():
    for mode, flat in {CASES!r}:
        yield mode, StateDictOptions(flatten_optimizer_state_dict=flat), f"{{folder}}/../{{mode}}-{{flat}}"

def keep(model, place, name):
    torch.save(model.state_dict(), f"{{place}}/after-{{name}}-{{rank}}.pt")

def load_and_train(mode, options, place, name, **more):
    # Ranks of a group have their parameters in one order. These train the same data, each by itself.
    model, optimizer = build(mode, weights=5, backwards=rank == 1, process_group="independent")
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({{"model": weights, "optim": state}}, checkpoint_id=place, **more)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    train(model, optimizer, range(STEPS[0], sum(STEPS)))
    keep(model, place, name)
"""
SAVE = """
join()
for mode, options, place in cases():
    model, optimizer = build(mode, process_group="independent")
    train(model, optimizer, range(STEPS[0]))
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=place)
dist.destroy_process_group()
"""
THREE = """
join()
for case in cases():
    load_and_train(*case, "three")
dist.destroy_process_group()
"""
ONE = """
for mode, options, place in cases():
    model, optimizer = build(mode)
    train(model, optimizer, range(sum(STEPS)))
    keep(model, place, "uninterrupted")
    load_and_train(mode, options, place, "no-group", no_dist=True)
join()
for case in cases():
    load_and_train(*case, "one")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_state_of_two_ranks_goes_on_with_three_and_with_one(tmp_path):
    """In a process without a group too, and where one rank has its parameters in another order."""
    for name, worker, world in (("save", SAVE, 2), ("three", THREE, 3), ("one", ONE, 1)):
        (tmp_path / name).mkdir()
        run_ranks(COMMON + worker, world, tmp_path / name)
    for mode, flat in CASES:
        place = tmp_path / f"{mode}-{flat}"
        after = {path.stem: torch.load(path) for path in place.glob("after-*.pt")}
        expected = after.pop("after-uninterrupted-0")
        assert sorted(after) == ["after-no-group-0", "after-one-0", *(f"after-three-{rank}" for rank in range(3))]
        for name, weights in after.items():
            differing = [key for key, value in expected.items() if not torch.equal(value, weights[key])]
            assert not differing, (mode, flat, name)
        # Each of the two ranks wrote a part of what both have.
        assert len(list(place.glob("*.distcp"))) == 2
