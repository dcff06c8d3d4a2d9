"""Moments in 8 bits, split masters and bf16 packed gradients, in an optimizer."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, bits
from helpers.optimizers import INTERRUPTIONS, assert_same, make_weights, set_gradients, snapshot
from helpers.optimizers import OPTIONS as SMALL
from helpers.packed_training import dense_setup, packed_setup, weights
from helpers.packed_training import train as train_model
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.nn.linear import PackedLinear
from lift_kernels.optim.state_conversion import STARTS, moments_as

MOMENTS = (FP32, BF16, "8bit")
MASTERS = ("fp32", "split", None)
RUNS = {
    "8bit": {"state_dtype": "8bit"},
    "split": {"master": "split"},
    "8bit-split": {"state_dtype": "8bit", "master": "split"},
    "8bit-stochastic": {"state_dtype": "8bit", "master": None, "rounding": "stochastic", "seed": 5},
    "8bit-per-entry": {"state_dtype": "8bit", "bias_correction": "per_entry"},
}


def make(dtype=BF16, **options):
    matrices = make_weights(dtype=dtype)
    return matrices, LiftAdamW(matrices, **SMALL | {"refresh_interval": 3} | options)


def train(optimizer, steps):
    for step in steps:
        set_gradients((p for group in optimizer.param_groups for p in group["params"]), step)
        optimizer.step()


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_an_interruption_changes_no_bit(options, interrupt):
    """A saved state keeps codes and scales, and all bits of a master."""
    matrices, optimizer = make(**options)
    train(optimizer, range(5))
    other, theirs = interrupt(optimizer, matrices)
    assert_same(snapshot(other), snapshot(optimizer))
    for step in range(5, 11):
        train(optimizer, [step])
        train(other, [step])
    assert_same(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("bias_correction", ["global", "per_entry"])
def test_split_masters_train_as_whole_ones(bias_correction):
    """Weights and masters have the same bits through refreshes; no entry meets a tie here."""
    runs = [make(master=master, bias_correction=bias_correction, state_dtype="8bit") for master in ("fp32", "split")]
    for _, optimizer in runs:
        train(optimizer, range(10))
    (whole, first), (split, second) = runs
    for p, q in zip(whole, split):
        assert torch.equal(bits(p), bits(q))
    saved, again = first.state_dict()["state"], second.state_dict()["state"]
    for i, entry in saved.items():
        assert entry["master"].dtype == again[i]["master"].dtype == FP32
        assert torch.equal(bits(entry["master"]), bits(again[i]["master"]))
        assert (entry["master"].to(BF16).float() != entry["master"]).any(), "a master holds more than its weight"
    assert second.state[split[0]]["master"].dtype == torch.int16


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("state_dtype", MOMENTS, ids=str)
@pytest.mark.parametrize("saved_as", RUNS.values(), ids=RUNS)
def test_a_state_loads_into_every_form(saved_as, state_dtype, master):
    """What is not the default of an optimizer stays; else the form of the state is taken."""
    matrices, optimizer = make(**saved_as)
    train(optimizer, range(4))
    again = [nn.Parameter(p.detach().clone()) for p in matrices]
    other = LiftAdamW(again, **SMALL, state_dtype=state_dtype, master=master)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    group, saved = other.param_groups[0], optimizer.param_groups[0]
    assert group["state_dtype"] == (state_dtype if state_dtype != FP32 else saved["state_dtype"])
    assert group["master"] == (master if master != "fp32" else saved["master"])
    for p, q in zip(matrices, again):
        mine, theirs = (moments_as(o.state[x], FP32) for o, x in ((other, q), (optimizer, p)))
        for name, tolerance in (("exp_avg", 0.012), ("exp_avg_sq", 0.02)):
            error = (mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()
            assert error <= tolerance, f"{name}: {error}"
        if group["state_dtype"] == saved["state_dtype"]:
            assert torch.equal(bits(other.state[q]["exp_avg"]), bits(optimizer.state[p]["exp_avg"]))
    train(other, range(4, 9))
    assert all(p.isfinite().all() for p in again)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_split_masters_load_into_a_model_of_another_dtype(dtype):
    """Its weights have no low halves, so masters are whole there, where there are some."""
    matrices, optimizer = make(master="split")
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    again = [nn.Parameter(p.detach().to(dtype)) for p in matrices]
    other = LiftAdamW(again, **SMALL)
    other.load_state_dict(saved)
    entry = other.state[again[0]]
    assert ("master" in entry) == (dtype == FP16)
    if dtype == FP16:
        assert entry["master"].dtype == FP32 and torch.equal(entry["master"], saved["state"][0]["master"])
    assert torch.equal(entry["exp_avg"], saved["state"][0]["exp_avg"])


def test_a_state_in_fp32_comes_from_one_in_codes():
    """The state dict says so: its options win over those that an optimizer has by default."""
    matrices, optimizer = make(state_dtype="8bit")
    train(optimizer, range(4))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["state_dtype"] = FP32
    other = LiftAdamW([nn.Parameter(p.detach().clone()) for p in matrices], **SMALL)
    other.load_state_dict(saved)
    p = other.param_groups[0]["params"][0]
    assert other.state[p]["exp_avg"].dtype == FP32
    expected = moments_as(optimizer.state[matrices[0]], FP32)
    assert torch.equal(other.state[p]["exp_avg_sq"], expected["exp_avg_sq"])


def test_groups_may_start_at_several_places():
    """As in a state whose parts several ranks have saved. Decoded, they are what they were."""
    generator = torch.Generator().manual_seed(0)
    entry = {"exp_avg": torch.randn(100, generator=generator), "exp_avg_sq": torch.rand(100, generator=generator)}
    parts = [moments_as({key: x[a:b] for key, x in entry.items()}, "8bit") for a, b in ((0, 37), (37, 100))]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert joined["exp_avg_scale"].shape == (2 + 2,)
    joined[STARTS] = torch.tensor([0, 37])
    decoded = moments_as(joined, FP32)
    for (a, b), part in zip(((0, 37), (37, 100)), parts):
        for key, values in moments_as(part, FP32).items():
            assert torch.equal(decoded[key][a:b], values)
    again = moments_as(joined, "8bit")
    assert again["exp_avg_scale"].shape == (4,)
    assert (moments_as(again, FP32)["exp_avg"] - entry["exp_avg"]).abs().max() < 0.05


def test_a_model_that_is_loaded_later_keeps_low_halves():
    """Low halves belong to any weight: beside another one the master rounds to that."""
    matrices, optimizer = make(master="split")
    train(optimizer, range(2))
    low = optimizer.state[matrices[0]]["master"].clone()
    assert (low != 0).any()
    with torch.no_grad():
        matrices[0].mul_(2.0)
    was = matrices[0].detach().clone()
    saved = optimizer.state_dict()["state"][0]
    index = saved["indices"].long()
    assert torch.equal(saved["master"].to(BF16), was.flatten()[index])
    assert torch.equal(optimizer.state[matrices[0]]["master"], low)
    train(optimizer, [2])
    moved = (matrices[0] - was).abs().flatten()[index].max()
    assert 0 < moved < 0.1, "the step starts from the loaded weight"


@pytest.mark.parametrize("name", ["reference", "native-cpu"])
def test_weights_that_are_set_to_zero_later_stay_finite(name):
    """A low half below the weight has no meaning beside a zero, of either sign."""
    matrices, optimizer = make(master="split", backend=name)
    train(optimizer, range(2))
    low = optimizer.state[matrices[0]]["master"]
    assert (low < 0).any()
    with torch.no_grad():
        matrices[0].copy_(torch.where(torch.rand_like(matrices[0], dtype=FP32) < 0.5, 0.0, -0.0))
    saved = optimizer.state_dict()["state"][0]["master"]
    assert saved.isfinite().all() and saved.abs().max() < 1e-38
    train(optimizer, [2])
    assert matrices[0].isfinite().all()


def live_bytes(skip: set[int]) -> int:
    """Bytes of all storages that are alive, but for those at the addresses of ``skip``."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(size for address, size in storages.items() if address not in skip)


@pytest.mark.parametrize(
    "options, grad_dtype, bound",
    [
        pytest.param({}, FP32, 20.1, id="defaults"),
        pytest.param({"state_dtype": "8bit", "master": "split"}, BF16, 10.3, id="everything on"),
        pytest.param({"state_dtype": "8bit", "master": None}, BF16, 8.3, id="no master"),
        pytest.param({"master": "split"}, FP32, 18.1, id="split"),
    ],
)
def test_all_storages_that_are_alive(options, grad_dtype, bound):
    """Index, gradient, moments, master and values of an entry, counted after a backward pass."""
    model = nn.Sequential(*[nn.Linear(768, 1024, bias=False), nn.Linear(1024, 512, bias=False)]).to(BF16)
    before = {p.untyped_storage().data_ptr() for p in model.parameters()}
    base = live_bytes(before)
    optimizer = LiftAdamW(
        pack_gradients(model, rank=4, density=0.1, grad_dtype=grad_dtype),
        rank=4,
        density=0.1,
        warm_start=None,
        **options,
    )
    for step in range(2):
        x = torch.randn(8, 768, generator=torch.Generator().manual_seed(step)).to(BF16)
        model(x).float().square().mean().backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    del x
    entries = sum(layer.indices.numel() for layer in model)
    assert (live_bytes(before) - base) / entries <= bound


def test_options_that_cannot_go_together():
    for dtype, name in ((FP32, "torch.float32"), (FP16, "torch.float16")):
        with pytest.raises(ValueError, match=f"master='split' keeps .* {name}; use master='fp32', or convert"):
            make(dtype, master="split")
    with pytest.raises(ValueError, match="rounding='stochastic' needs master=None"):
        make(master="split", rounding="stochastic")
    with pytest.raises(ValueError, match="master must be 'fp32', 'split' or None, got 'low'"):
        make(master="low")
    with pytest.raises(TypeError, match="state_dtype must be torch.float32, torch.bfloat16 or '8bit', got '4bit'"):
        make(state_dtype="4bit")
    model = nn.Linear(16, 16).to(BF16)
    with pytest.raises(TypeError, match=r"grad_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        pack_gradients(model, rank=4, grad_dtype=FP16)
    assert type(model) is nn.Linear
    groups = pack_gradients(model, rank=4)
    with pytest.raises(ValueError, match="values: fp32 values of a packed layer are its masters, so master=None"):
        LiftAdamW(groups, master=None)


@pytest.mark.parametrize("key, value", [("exp_avg", float("nan")), ("exp_avg_sq", float("inf"))])
def test_no_moment_that_is_not_finite_is_loaded_into_codes(key, value):
    matrices, optimizer = make()
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"][1][key][3] = value
    again, other = make(state_dtype="8bit")
    before = snapshot(other)
    with pytest.raises(ValueError, match=f"parameter 1 of group 0: {key} of the state dict is not finite, and 8-bit"):
        other.load_state_dict(saved)
    assert_same(snapshot(other), before)


def test_a_gradient_that_is_not_finite_shows_in_weights_and_codes():
    """As with fp32 moments, and for all entries of its group: nothing hides it."""
    matrices, optimizer = make(FP32, state_dtype="8bit", refresh_interval=None)
    train(optimizer, range(1))
    entry = optimizer.state[matrices[0]]
    set_gradients(matrices, 1)
    matrices[0].grad.view(-1)[entry["indices"][40]] = float("inf")
    optimizer.step()
    assert entry["exp_avg_scale"].isnan().tolist() == [False, True] + [False] * (len(entry["exp_avg_scale"]) - 2)
    assert not matrices[0].view(-1)[entry["indices"][40]].isfinite()
    set_gradients(matrices, 2)
    optimizer.step()
    spoiled = matrices[0].detach().view(-1)[entry["indices"].long()].isnan()
    assert spoiled.nonzero().flatten().tolist() == list(range(32, 64))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda e: e.pop("exp_avg_scale"), "the state dict has 8-bit moments and no exp_avg_scale"),
        (lambda e: e.update(exp_avg_sq_scale=torch.zeros(2)), "exp_avg_sq_scale of the state dict must be 3 float32"),
        (lambda e: e.update(exp_avg_sq=e["exp_avg_sq"].float()), "must both be 8-bit codes or both be none"),
        (lambda e: e.update({STARTS: torch.tensor([0, 900])}), "must rise from 0 and stay below its 96 entries"),
        (lambda e: e.update({STARTS: torch.tensor([5])}), r"must rise from 0 .* got \[5\]"),
    ],
)
def test_a_damaged_state_of_codes_changes_nothing(damage, message):
    _, optimizer = make(state_dtype="8bit")
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    damage(saved["state"][0])
    again, other = make(state_dtype="8bit")
    before = snapshot(other)
    with pytest.raises((ValueError, TypeError), match=message):
        other.load_state_dict(saved)
    assert_same(snapshot(other), before)


@pytest.mark.parametrize("state_dtype", MOMENTS, ids=str)
def test_both_modes_train_the_same(state_dtype):
    """With fp32 packed gradients of bf16 weights, which are those of the dense ones."""
    options = {"state_dtype": state_dtype, "master": "split", "refresh_interval": 2}
    packed, dense = packed_setup(dtype=BF16, **options), dense_setup(dtype=BF16, **options)
    for run in (packed, dense):
        train_model(*run, range(5))
    assert_same(weights(packed[0]), weights(dense[0]))


def test_bf16_gradients_of_bf16_weights_are_the_dense_ones():
    """A dense gradient of a bf16 weight is bf16 as well."""
    runs = []
    for grad_dtype in (FP32, BF16):
        model = nn.Linear(24, 30, bias=False).to(BF16)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        optimizer = LiftAdamW(pack_gradients(model, rank=4, density=0.1, grad_dtype=grad_dtype), lr=0.01, rank=4)
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(1)).to(BF16)
        for _ in range(3):
            model(x).float().square().mean().backward()
            assert model.values.grad.dtype == grad_dtype
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.weight)
    assert torch.equal(bits(runs[0]), bits(runs[1]))


def test_bf16_gradients_of_several_passes_are_added_in_fp32():
    """The sum is fp32, and differs from that of fp32 gradients by the rounding of the first."""
    sums = []
    for grad_dtype in (FP32, BF16):
        model = nn.Linear(64, 48, bias=False)
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
        LiftAdamW(pack_gradients(model, rank=4, density=0.1, grad_dtype=grad_dtype), lr=0.01, rank=4)
        for i in range(16):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
        sums.append(model.values.grad)
    assert sums[1].dtype == FP32
    error = (sums[1] - sums[0]).norm() / sums[0].norm()
    assert 0 < error < 2**-10, "less than a rounding of the sum to bf16"


@pytest.mark.parametrize("weight", [FP32, BF16], ids=str)
def test_values_without_numbers_survive_copies_and_moves(weight, caplog):
    caplog.set_level(logging.WARNING)
    model, optimizer = packed_setup(dtype=weight, master="split" if weight == BF16 else "fp32", state_dtype="8bit")
    if weight == FP32:
        model, optimizer = packed_bf16(weight)
    train_model(model, optimizer, range(2))
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert all(not layer.stores_values and layer.values.isnan().all() for layer in layers)
    assert all(layer.values.untyped_storage().nbytes() == layer.values.element_size() for layer in layers)
    copied, other = copy.deepcopy((model, optimizer))
    model.to("cpu").float() if weight == FP32 else model.to("cpu")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for run in ((model, optimizer), (copied, other)):
        train_model(*run, range(2, 5))
    assert_same(weights(model), weights(copied))
    again = copy.deepcopy(model)
    for m in again.modules():
        if isinstance(m, PackedLinear):
            assert not m.stores_values and m.values.untyped_storage().nbytes() == m.values.element_size()
    assert not caplog.records, "no weight is said to have changed"


def packed_bf16(weight):
    from helpers.small_models import ThreeLinears

    model = ThreeLinears(weight)
    groups = pack_gradients(model, rank=4, density=0.1, freeze_rest=True, grad_dtype=BF16)
    return model, LiftAdamW(groups, lr=0.01, rank=4, density=0.1, state_dtype="8bit")


def test_another_optimizer_gets_values_with_numbers():
    model = nn.Linear(24, 30, bias=False).to(BF16)
    optimizer = LiftAdamW(pack_gradients(model, rank=4, density=0.1, grad_dtype=BF16), rank=4, master="split")
    model(torch.ones(2, 24, dtype=BF16)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert model.values.isnan().all()
    del optimizer
    gc.collect()
    was = model.weight.detach().clone()
    sgd = torch.optim.SGD([model.values], lr=0.1)
    model(torch.ones(2, 24, dtype=BF16)).float().square().mean().backward()
    index, grad = model.indices.long(), model.values.grad.clone()
    sgd.step()
    assert model.stores_values and torch.equal(model.values, was.flatten()[index].add(grad, alpha=-0.1))
    assert torch.equal(model.weight.flatten()[index], model.values.detach())


def test_another_optimizer_cannot_train_coarse_values():
    model = nn.Linear(24, 30, bias=False)
    pack_gradients(model, rank=4, density=0.1, grad_dtype=BF16)
    before = bits(model.weight).clone()
    sgd = torch.optim.SGD([model.values], lr=0.1)
    model(torch.ones(2, 24)).square().mean().backward()
    with pytest.raises(RuntimeError, match="its torch.bfloat16 values are too coarse for torch.float32 weights; train"):
        sgd.step()
    assert torch.equal(bits(model.weight), before)


def test_small_steps_move_as_many_weights():
    """With a rate of 1e-5 a step is far below half a bf16 ulp. Masters add such steps up."""
    moved = []
    for options in ({}, {"state_dtype": "8bit", "master": "split"}):
        generator = torch.Generator().manual_seed(3)
        weight = nn.Parameter((0.02 * torch.randn(256, 256, generator=generator)).to(BF16))
        was = weight.detach().clone()
        optimizer = LiftAdamW([weight], lr=1e-5, rank=8, density=0.2, refresh_interval=100, **options)
        scale = torch.exp(1.5 * torch.randn(256, 1, generator=generator))
        for _ in range(500):
            weight.grad = (scale * (torch.randn(256, 256, generator=generator) + 0.3)).to(BF16)
            optimizer.step()
        moved.append(int((weight != was).sum()))
    assert moved[0] > 5000
    assert abs(moved[1] - moved[0]) <= 0.01 * moved[0]
