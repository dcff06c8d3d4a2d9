"""A state that two ranks saved by torch.distributed.checkpoint goes on with any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.expert_model import STEPS, build, train
from helpers.ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

CASES = [(mode, flat) for mode in ("matrix", "packed") for flat in (False, True)]
WORKER = f"""
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch.distributed.checkpoint as dcp
from helpers.expert_model import STEPS, build, train
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

join()
for mode, flat in {CASES!r}:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    place = f"{{folder}}/../{{mode}}-{{flat}}"
"""
SAVE = """
    model, optimizer = build(mode)
    train(model, optimizer, range(STEPS[0]))
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=place)
dist.destroy_process_group()
"""
LOAD = """
    model, optimizer = build(mode, weights=5, backwards=rank == 1)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=place)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    train(model, optimizer, range(STEPS[0], sum(STEPS)))
    torch.save(model.state_dict(), f"{place}/after-{world}-{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_state_of_two_ranks_goes_on_with_three_and_with_one(tmp_path):
    """In a plain process too, and where one rank has its parameters in another order."""
    for name, worker, world in (("save", SAVE, 2), ("three", LOAD, 3), ("one", LOAD, 1)):
        (tmp_path / name).mkdir()
        run_ranks(WORKER + worker, world, tmp_path / name)
    for mode, flat in CASES:
        place = tmp_path / f"{mode}-{flat}"
        run, alone = build(mode), build(mode, weights=5)
        train(*run, range(sum(STEPS)))
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        weights, state = get_state_dict(*alone, options=options)
        dcp.load({"model": weights, "optim": state}, checkpoint_id=place, no_dist=True)
        set_state_dict(*alone, model_state_dict=weights, optim_state_dict=state, options=options)
        train(*alone, range(STEPS[0], sum(STEPS)))
        found = [torch.load(path) for path in sorted(place.glob("after-*.pt"))]
        assert len(found) == 4 and len(list(place.glob("*.distcp"))) == 2
        for other in (*found, alone[0].state_dict()):
            assert all(torch.equal(value, other[key]) for key, value in run[0].state_dict().items()), place
