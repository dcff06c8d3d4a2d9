"""torch.distributed.checkpoint saves and loads LiftAdamW's state, in this process alone.

`distributed/test_checkpoint_of_ranks.py` does it on several ranks.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.expert_model import MASKS, OPTIONS, STEPS, build, train
from helpers.optimizers import assert_same, make_weights, snapshot
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from lift_kernels import LiftAdamW
from lift_kernels.masks.lowrank import low_rank_factors

BEFORE, AFTER = range(STEPS[0]), range(STEPS[0], sum(STEPS))
MODES = ("matrix", "packed")
FORMS = {
    "defaults": {},
    "per entry": {"bias_correction": "per_entry", "state_dtype": torch.bfloat16},
    "bf16": {"dtype": torch.bfloat16},
    "spread": {"refresh_schedule": "spread", "refresh_drift": None},
    "cold": {"warm_start": None},
    "warm on the host": {"warm_start": "cpu", "mask_method": "chebyshev"},
    "gram": {"mask_method": "gram"},
    "svd": {"mask_method": "svd"},
    "random": {"selection": "random", "refresh_drift": None},
    "full rank": {"rank": 500, "budget_rank": 2},
}
BASES = [((300, 400), 8, False), ((400, 300), 200, False), ((40, 30), 4, False), ((300, 257), 120, True)]
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.distributed")


def form(state):
    """Keys, shapes and dtypes of a state dict's entries."""
    return {
        i: {key: (tuple(value.shape), value.dtype) for key, value in entry.items()}
        for i, entry in state["state"].items()
    }


def save(folder, model, optimizer, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder, no_dist=True)


def load(folder, model, optimizer, flat, **options):
    options = StateDictOptions(flatten_optimizer_state_dict=flat, **options)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


def by_name(model, optimizer):
    """All weights, and the state and options of each parameter, by its name."""
    state = optimizer.state_dict()
    out = dict(model.state_dict())
    for group in state["param_groups"]:
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for i, name in zip(group["params"], group["param_names"]):
            out |= {f"{name}/{key}": value for key, value in {**options, **state["state"][i]}.items()}
    return out


def same(one, other, *, frozen=True):
    """Check that two models and their optimizers are equal to the bit, whatever their order.

    Args:
        frozen: also the state of frozen parameters, which torch's helpers do not load.
    """
    expected, found = by_name(*one), by_name(*other)
    assert expected.keys() == found.keys() and len(expected) > 100
    for key, value in expected.items():
        if key.startswith("frozen") and not frozen:
            continue
        assert type(value) is type(found[key]), key
        assert torch.equal(value, found[key]) if isinstance(value, torch.Tensor) else value == found[key], key


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_keys_shapes_and_dtypes_are_the_same_from_the_start(mode, options):
    model, optimizer = build(mode, **options)
    first = form(optimizer.state_dict())
    train(model, optimizer, BEFORE)
    assert form(optimizer.state_dict()) == first and len(first) == 10
    entry = optimizer.state_dict()["state"][0]
    rank = min(OPTIONS["rank"] if "rank" not in options else options["rank"], 264)
    principal = "selection" not in options and "warm_start" not in options or options.get("warm_start") == "cpu"
    assert ("threshold" in entry) == principal
    assert ("basis" in entry) == (principal and options.get("mask_method") != "svd" and rank < 132)
    if "basis" in entry:
        assert entry["basis"].shape == (264, 14) and entry["basis"].any()


@pytest.mark.parametrize("method", ["auto", "gram", "chebyshev", "svd"])
@pytest.mark.parametrize(("shape", "rank", "on_cuda_alone"), BASES)
def test_the_width_of_a_basis_is_known_before_the_mask(shape, rank, on_cuda_alone, method):
    """It has a place also where another type of device would leave one."""
    weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = LiftAdamW([weight], rank=rank, density=0.01, mask_method=method)
    offered = optimizer.state_dict()["state"][0].get("basis")
    made = low_rank_factors(weight, rank, method=method).basis
    elsewhere = on_cuda_alone and method in ("auto", "gram")
    assert (offered is None) == (made is None and not elsewhere)
    assert made is None or (offered.shape == made.shape and offered.dtype == made.dtype and not offered.any())
    optimizer.refresh()
    saved = optimizer.state_dict()["state"][0].get("basis")
    assert offered is None or (saved.shape == offered.shape and bool(saved.any()) == (made is not None))
    other = LiftAdamW([weight], rank=rank, density=0.01, mask_method=method)
    other.load_state_dict(optimizer.state_dict())
    assert ("basis" in other.state[weight]) == (made is not None)


def test_a_state_without_masks_loads_as_nothing():
    """Dense parameters that no gradient has reached have no moments either."""
    model, fresh = build("matrix")
    state = fresh.state_dict()
    assert all(not entry for entry in fresh.state.values()) and len(fresh.state) == 10
    assert (state["state"][0]["indices"] == -1).all() and state["state"][0]["indices"].numel() == 7181
    trained = build("matrix", weights=1)
    train(*trained, BEFORE)
    trained[0].load_state_dict(model.state_dict())
    trained[1].load_state_dict(state)
    assert all(not entry for entry in trained[1].state.values()) and len(trained[1].state) == 10
    train(model, fresh, AFTER)
    train(*trained, AFTER)
    same((model, fresh), trained)
    assert not trained[1].state[trained[0].idle.bias] and trained[1].state[trained[0].norm.bias]["step"] == len(AFTER)


def test_an_index_list_that_is_wrong_in_part_is_refused():
    _, optimizer = build("matrix")
    state = optimizer.state_dict()
    state["state"][1]["indices"][1:] = torch.arange(len(state["state"][1]["indices"]) - 1)
    with pytest.raises(IndexError, match="down.weight"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("mode", MODES)
def test_torch_takes_no_step_to_fill_the_state(mode):
    """It does where ``optimizer.state`` is empty, with gradients of 0. That would make masks."""
    model, optimizer = build(mode)
    other = build(mode)
    _init_optim_state(optimizer)
    assert all(p.grad is None for p in model.parameters()) and optimizer.last_refresh is None
    assert all(not entry for entry in optimizer.state.values())
    assert [group["steps_since_refresh"] for group in optimizer.param_groups] == [0, 0]
    train(model, optimizer, BEFORE)
    train(*other, BEFORE)
    same((model, optimizer), other)


RESUMED = [
    *((mode, flat, "defaults") for mode in MODES for flat in (False, True)),
    ("packed", True, "per entry"),
    ("packed", True, "bf16"),
    ("matrix", True, "bf16"),
    ("matrix", True, "spread"),
    ("matrix", False, "random"),
]


@pytest.mark.parametrize(("mode", "flat", "options"), RESUMED)
def test_a_run_goes_on_with_the_same_bits(tmp_path, mode, flat, options):
    options = FORMS[options]
    run = build(mode, **options)
    train(*run, BEFORE)
    save(tmp_path, *run, flat)
    again = build(mode, weights=1, **options)
    load(tmp_path, *again, flat)
    same(run, again, frozen=False)
    train(*run, AFTER)
    train(*again, AFTER)
    same(run, again, frozen=False)
    methods = [{m.name: m.method for m in of_one.last_refresh.matrices} for _, of_one in (run, again)]
    assert methods[0] == methods[1] and methods[0], "as many starts are warm"


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("mode", MODES)
def test_groups_and_parameters_may_come_in_another_order(tmp_path, mode, flat):
    run = build(mode, refresh_interval=3)
    train(*run, BEFORE)
    save(tmp_path, *run, flat)
    again = build(mode, weights=1, refresh_interval=3, backwards=True)
    load(tmp_path, *again, flat)
    same(run, again, frozen=False)
    assert again[1].param_groups[0]["param_names"][0] == "frozen.bias"
    train(*run, AFTER)
    train(*again, AFTER)
    same(run, again, frozen=False)


def test_names_of_the_loading_optimizer_count_where_shapes_agree(tmp_path):
    """``param_names`` of the saved group come in the order of the saving optimizer."""

    def run(order, names=("0.weight", "1.weight")):
        model = torch.nn.Sequential(*(torch.nn.Linear(12, 12, bias=False) for _ in range(2)))
        params = list(zip(names, model.parameters()))
        return model, LiftAdamW([params[i] for i in order], **MASKS)

    def trained(model, optimizer):
        for step in range(2):
            model(torch.randn(3, 12, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        return model, optimizer

    one, other = trained(*run((0, 1))), run((1, 0))
    weights, state = get_state_dict(*one)
    set_state_dict(*other, model_state_dict=weights, optim_state_dict=state)
    for p, q in zip(one[0].parameters(), other[0].parameters()):
        assert torch.equal(one[1].state[p]["indices"], other[1].state[q]["indices"])
    assert other[1].param_groups[0]["param_names"] == ["1.weight", "0.weight"]
    named, loading = trained(*run((0, 1), ("a", "b"))), run((1, 0), ("a", "b"))
    _, state = get_state_dict(*named)
    before = snapshot(loading[1])
    with pytest.raises(ValueError, match=r"named 0\.weight, 1\.weight, which this optimizer names a, b, in another"):
        set_optimizer_state_dict(*loading, state)
    assert_same(snapshot(loading[1]), before)
    loading = run((0, 1), ("a", "b"))
    set_optimizer_state_dict(*loading, state)
    for p, q in zip(named[0].parameters(), loading[0].parameters()):
        assert torch.equal(named[1].state[p]["indices"], loading[1].state[q]["indices"])


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_all_options_survive(tmp_path, flat):
    """Also a learning rate that is a tensor, betas, a dtype and the seed, with their types."""
    options = {"betas": (0.8, 0.95), "eps": 1e-7, "maximize": True, "state_dtype": torch.bfloat16, "seed": 7}
    options |= {"refresh_interval": 9, "bias_correction": "per_entry", "refresh_drift": None, "budget_rank": 1}
    run = build("matrix", **options, lr=torch.tensor(0.03))
    run[1].param_groups[1]["lr"] = torch.tensor(0.5)
    train(*run, BEFORE)
    save(tmp_path, *run, flat)
    again = build("matrix", weights=1, **(options | {"seed": 1}), lr=torch.tensor(0.2))
    live = again[1].param_groups[0]["lr"]
    load(tmp_path, *again, flat)
    assert live == torch.tensor(0.2), "a state dict shares no tensor with the optimizer"
    same(run, again, frozen=False)
    assert again[1].seed == 7 and [group["lr"].item() for group in again[1].param_groups] == pytest.approx([0.03, 0.5])
    assert [group["steps_since_refresh"] for group in again[1].param_groups] == [3, 0]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_that_has_trained_goes_back(tmp_path, mode, flat):
    """Its own masks are replaced. The sample of the weights comes along and tells other weights."""
    run = build(mode)
    train(*run, BEFORE)
    kept = copy.deepcopy(run)
    save(tmp_path, *run, flat)
    train(*run, AFTER)
    load(tmp_path, *run, flat)
    same(kept, run, frozen=False)
    _, state = get_state_dict(*run, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    with torch.no_grad():
        run[0].wide.weight.add_(1.0)
    set_optimizer_state_dict(*run, state, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    with pytest.raises(RuntimeError, match=r"first wide\.\w+ \(256 of 256 sampled trained entries\)"):
        train(*run, AFTER)


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_state_dict_goes_through_a_folder(tmp_path, mode):
    """Without torch's helpers parameters are known by position."""
    run = build(mode)
    train(*run, BEFORE)
    dcp.save({"optim": run[1].state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    again = build(mode, weights=1)
    again[0].load_state_dict(run[0].state_dict())
    loaded = {"optim": again[1].state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    again[1].load_state_dict(state_dict=loaded["optim"])
    same(run, again)
    train(*run, AFTER)
    train(*again, AFTER)
    same(run, again)


@pytest.mark.parametrize("first", MODES)
def test_a_state_goes_to_the_other_mode_through_its_own(tmp_path, first):
    other = MODES[1 - MODES.index(first)]
    run = build(first, dtype=torch.bfloat16)
    train(*run, BEFORE)
    save(tmp_path, *run, False)
    between, again = build(first, weights=1, dtype=torch.bfloat16), build(other, weights=2, dtype=torch.bfloat16)
    load(tmp_path, *between, False)
    again[0].load_state_dict(between[0].state_dict())
    again[1].load_state_dict(between[1].state_dict())
    train(*run, AFTER)
    train(*again, AFTER)
    assert all(torch.equal(value, again[0].state_dict()[key]) for key, value in run[0].state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter 'wide\.\w+'"):
        set_optimizer_state_dict(*build(other), get_state_dict(*run)[1])


def test_a_checkpoint_of_an_earlier_version_loads_in_part(tmp_path):
    """It has no samples of weights, and its shapes are lists."""
    run = build("matrix")
    train(*run, BEFORE)
    weights, state = get_state_dict(*run)
    for entry in state["state"].values():
        if "indices" in entry:
            entry |= {"shape": entry.pop("matrix_shape").tolist(), "version": 1}
            for key in ("weight_sample", "basis", "threshold", "drift_values", "drift_rate"):
                entry.pop(key, None)
    dcp.save({"optim": state}, checkpoint_id=tmp_path, no_dist=True)
    again = build("matrix", weights=1)
    again[0].load_state_dict(run[0].state_dict())
    loaded = {"optim": get_state_dict(*again)[1]}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    set_optimizer_state_dict(*again, loaded["optim"])
    entry = again[1].state[again[0].wide.weight]
    assert entry.keys() == {"step", "indices", "exp_avg", "exp_avg_sq"} and entry["step"] == len(BEFORE)
    assert torch.equal(entry["indices"], run[1].state[run[0].wide.weight]["indices"])
    train(*again, AFTER)


def test_groups_may_change_before_the_state_is_saved():
    weights = make_weights()
    optimizer = LiftAdamW([{"params": weights[:1]}, {"params": weights[1:]}], **MASKS)
    optimizer.param_groups.pop()
    assert list(optimizer.state_dict()["state"]) == [0] and list(optimizer.state) == weights[:1]


def test_a_copy_names_its_keys_too():
    model, optimizer = copy.deepcopy(build("packed"))
    entry = optimizer.state[model.wide.values]
    assert set(entry) == {*entry.keys(), "weight_sample", "matrix_shape", "version"} and len(entry) == len(entry.keys())
    assert dict(entry).keys() == entry.keys() and "weight_sample" not in entry
