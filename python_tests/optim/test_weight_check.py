"""A loaded state is compared with the weights of the model, once, at a step."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.bits import BF16, FP16, FP32
from helpers.optimizers import INTERRUPTIONS, OPTIONS, assert_same, make_weights, set_gradients, snapshot, train
from helpers.packed_training import dense_setup, loss_of, packed_setup
from helpers.packed_training import train as train_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lift_kernels import LiftAdamW
from lift_kernels.nn.weight_sample import count_differing, sample_of
from lift_kernels.ops import dispatch

NAMES = ("q.weight", "k.weight", "norm.weight")
SHAPES = ((24, 40), (24, 40), (17,))
REFUSED = (
    r"saved with other weights than the model has now: 2 of 2 matrices differ, first q\.weight \((\d+) of 96 sampled "
    r"trained entries\); load the model's weights .* or, .* call optimizer\.refresh\(drop_gradients=True\)"
)


def named(weights):
    return list(zip(NAMES, weights))


def new_run(seed=1, dtype=FP32, **options):
    """Weights of another initialization, with their optimizer."""
    generator = torch.Generator().manual_seed(seed)
    weights = [nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(dtype)) for s in SHAPES]
    return weights, LiftAdamW(named(weights), **OPTIONS | {"refresh_interval": 3} | options)


def saved_run(dtype=FP32, **options):
    """Weights after two steps, their optimizer, and copies of both as they are saved."""
    weights = make_weights(SHAPES, dtype)
    optimizer = LiftAdamW(named(weights), **OPTIONS | {"refresh_interval": 3} | options)
    train(optimizer, range(2))
    return weights, optimizer, [w.detach().clone() for w in weights], optimizer.state_dict()


def fill(weights, values):
    with torch.no_grad():
        for w, value in zip(weights, values):
            w.copy_(value)


def refuses(optimizer, weights, step, message=REFUSED):
    """Check that a step raises and changes nothing."""
    set_gradients(weights, step)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_weights_of_another_seed_are_refused_until_the_right_ones_are_loaded(dtype):
    """Then training goes on with the bits of the undisturbed run."""
    weights, optimizer, values, saved = saved_run(dtype)
    other, loaded = new_run(dtype=dtype)
    loaded.load_state_dict(saved)
    refuses(loaded, other, 2)
    refuses(loaded, other, 2)
    fill(other, values)
    for o in (loaded, optimizer):
        train(o, range(2, 5))
    assert_same(snapshot(loaded), snapshot(optimizer))


def test_the_model_may_be_loaded_after_the_optimizer():
    weights, optimizer, values, saved = saved_run()
    other, loaded = new_run()
    loaded.load_state_dict(saved)
    fill(other, values)
    for o in (loaded, optimizer):
        train(o, range(2, 5))
    assert_same(snapshot(loaded), snapshot(optimizer))


def test_matrices_of_one_shape_without_names_in_another_order_are_refused():
    weights, _, values, saved = saved_run()
    del saved["param_groups"][0]["param_names"]
    other = [nn.Parameter(values[i].clone()) for i in (1, 0, 2)]
    loaded = LiftAdamW(other, **OPTIONS)
    loaded.load_state_dict(saved)
    refuses(loaded, other, 2, "2 of 2 matrices differ, first parameter 0 of group 0")


def test_one_matrix_of_the_base_is_enough():
    """Its name and their number are said."""
    weights, _, values, saved = saved_run()
    other, loaded = new_run()
    fill(other, [values[0], make_weights(SHAPES)[1], values[2]])
    loaded.load_state_dict(saved)
    refuses(loaded, other, 2, r"1 of 2 matrices differ, first k\.weight")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_refresh_takes_the_present_weights(dtype):
    """The masks are those that the present weights give, and the step goes on."""
    _, _, _, saved = saved_run(dtype)
    other, loaded = new_run(dtype=dtype)
    loaded.load_state_dict(saved)
    refuses(loaded, other, 2)
    loaded.refresh(drop_gradients=True)
    _, fresh = new_run(dtype=dtype)
    fresh.refresh()
    for p, q in zip(other[:2], fresh.param_groups[0]["params"]):
        assert torch.equal(loaded.state[p]["indices"], fresh.state[q]["indices"])
    before = other[0].detach().clone()
    loaded.step()
    assert not torch.equal(other[0].detach(), before) and loaded.state[other[0]]["step"] == 3


def test_a_refresh_that_fails_leaves_the_check_to_the_next_step():
    _, _, _, state = saved_run()
    weights, loaded = new_run()
    loaded.load_state_dict(state)
    kept = weights[1][3, 4].item()
    fill([weights[1][3, 4]], [torch.tensor(float("nan"))])
    with pytest.raises(ValueError, match="k.weight"):
        loaded.refresh(drop_gradients=True)
    fill([weights[1][3, 4]], [torch.tensor(kept)])
    refuses(loaded, weights, 2)


def test_a_state_without_its_samples_loads_onto_any_weights():
    """As one of an earlier version."""
    _, optimizer, _, saved = saved_run(refresh_interval=None)
    for entry in saved["state"].values():
        entry.pop("weight_sample", None)
    other, loaded = new_run()
    loaded.load_state_dict(saved)
    train(loaded, [2])
    assert loaded.state[other[0]]["step"] == 3
    mask = optimizer.state[optimizer.param_groups[0]["params"][0]]["indices"]
    assert torch.equal(loaded.state[other[0]]["indices"], mask)


@pytest.mark.parametrize("saved_as", [FP32, BF16, FP16])
@pytest.mark.parametrize("loaded_as", [FP32, BF16, FP16])
def test_the_same_weights_in_another_dtype_fit(saved_as, loaded_as):
    """Those of another seed do not."""
    _, _, values, saved = saved_run(saved_as, state_dtype=FP32)
    other, loaded = new_run(dtype=loaded_as)
    fill(other, values)
    loaded.load_state_dict(saved)
    train(loaded, [2])
    assert loaded.state[other[0]]["step"] == 3
    strangers, loaded = new_run(dtype=loaded_as)
    loaded.load_state_dict(saved)
    refuses(loaded, strangers, 2)


def test_a_change_after_the_first_step_is_followed_and_not_refused(caplog):
    """Then the rule for weights that change from outside holds."""
    _, _, values, saved = saved_run(BF16)
    other, loaded = new_run(dtype=BF16)
    fill(other, values)
    loaded.load_state_dict(saved)
    train(loaded, [2])
    assert not caplog.records
    with torch.no_grad():
        other[0].add_(1)
    train(loaded, [3])
    assert loaded.state[other[0]]["step"] == 4 and "q.weight was changed outside the optimizer" in caplog.text


@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_last_of_two_loads_counts(steps_before):
    """Also in an optimizer that has stepped."""
    _, _, values, saved = saved_run()
    other, loaded = new_run()
    train(loaded, range(steps_before))
    train(loaded, [steps_before])
    own = loaded.state_dict()
    loaded.load_state_dict(saved)
    loaded.load_state_dict(own)
    train(loaded, [5])
    assert loaded.state[other[0]]["step"] == steps_before + 2
    loaded.load_state_dict(saved)
    refuses(loaded, other, 6)
    fill(other, values)
    train(loaded, [6])
    assert loaded.state[other[0]]["step"] == 3


def test_a_state_that_is_saved_again_before_a_step_keeps_its_sample():
    """The state still belongs to the weights it was saved with."""
    _, _, values, saved = saved_run()
    other, loaded = new_run()
    loaded.load_state_dict(saved)
    again = loaded.state_dict()
    for i in (0, 1):
        assert torch.equal(again["state"][i]["weight_sample"], saved["state"][i]["weight_sample"])
    saved["state"][0]["weight_sample"].zero_()  # The optimizer has a copy.
    fill(other, values)
    train(loaded, [2])
    for i, w in enumerate(other[:2]):
        entries = w.detach().flatten()[loaded.state[w]["indices"].long()]
        assert torch.equal(loaded.state_dict()["state"][i]["weight_sample"], entries)


@pytest.mark.parametrize("interrupt", INTERRUPTIONS[:2])
def test_copies_and_pickles_hold_no_sample(interrupt):
    weights, optimizer, _, _ = saved_run()
    other, other_weights = interrupt(optimizer, weights)
    assert not any("weight_sample" in entry for entry in (*other.state.values(), *optimizer.state.values()))
    with torch.no_grad():
        other_weights[0].add_(1)
    train(other, [2])
    assert other.state[other_weights[0]]["step"] == 3


def test_a_step_that_a_scaler_skips_is_checked_too():
    _, _, values, saved = saved_run()
    other, loaded = new_run()
    loaded.load_state_dict(saved)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def scaled_step(step, bad=False):
        set_gradients(other, step)
        for w in other:
            w.grad *= scaler.get_scale()
        if bad:
            other[0].grad[0, 0] = float("inf")
        scaler.scale(torch.ones(1))
        scaler.step(loaded)
        scaler.update()

    with pytest.raises(RuntimeError, match=REFUSED):
        scaled_step(2, bad=True)
    fill(other, values)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_step(2, bad=True)
    assert all(torch.equal(w, value) for w, value in zip(other, values)) and not loaded._table.samples
    scaled_step(2)
    again, undisturbed = new_run()
    fill(again, values)
    undisturbed.load_state_dict(saved)
    set_gradients(again, 2)
    undisturbed.step()
    assert all(torch.equal(w, expected) for w, expected in zip(other, again))


def test_a_refused_step_leaves_no_scale_behind():
    """torch multiplies its scale by one that it finds at the optimizer."""
    _, _, values, saved = saved_run()
    other, loaded = new_run()
    loaded.load_state_dict(saved)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    set_gradients(other, 2)
    with pytest.raises(RuntimeError, match=REFUSED):
        scaler.step(loaded)
    assert not hasattr(loaded, "grad_scale") and not hasattr(loaded, "found_inf")


def test_a_captured_step_compares_nothing(monkeypatch):
    """It must not wait. The first step that is not captured does."""
    _, _, _, saved = saved_run(capturable=True)
    other, loaded = new_run(capturable=True)
    loaded.load_state_dict(saved)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "capturing", lambda: True)
        train(loaded, [2])
    assert loaded.state[other[0]]["step"] == 3
    refuses(loaded, other, 3)


def test_a_model_that_is_converted_after_the_load_is_named():
    """Before a comparison, and before masters follow."""
    _, _, _, saved = saved_run()
    other, loaded = new_run()
    loaded.load_state_dict(saved)
    for w in other:
        w.data = w.data.to(BF16)
    set_gradients(other, 2)
    with pytest.raises(TypeError, match=r"q\.weight: the weight became torch.bfloat16 .* make the optimizer after"):
        loaded.step()


def test_an_optimizer_may_be_made_before_the_model_is_converted():
    """Its first step makes the masks from the converted weights."""
    weights, optimizer = new_run()
    for w in weights:
        w.data = w.data.to(BF16)
    other, made_after = new_run(dtype=BF16)
    for o in (optimizer, made_after):
        train(o, range(2))
    assert_same(snapshot(optimizer), snapshot(made_after))


BAD_SAMPLES = [
    (torch.zeros(0), ValueError, r"1 to 96 numbers, got shape \(0,\)"),
    (torch.zeros(97), ValueError, r"1 to 96 numbers, got shape \(97,\)"),
    (torch.zeros(5, dtype=torch.int32), TypeError, r"float32, bfloat16 or float16, got torch\.int32"),
    ([1.0], TypeError, "must be a tensor, got list"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD_SAMPLES)
def test_a_sample_that_is_none(value, error, message):
    weights, optimizer, _, saved = saved_run()
    saved["state"][1]["weight_sample"] = value
    before = snapshot(optimizer)
    with pytest.raises(error, match=rf"k\.weight: weight_sample .*{message}"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


def test_a_sample_has_entries_of_every_part_of_a_stack():
    """Also where a stack has more matrices than a sample of a matrix has entries."""
    stack = torch.randn(300, 4, 5)
    indices = (torch.arange(300)[:, None] * 20 + torch.tensor([1, 7, 13])).flatten().int()
    sample = sample_of(stack, indices)
    assert sample.shape == (300,)
    for part in (0, 7, 299):
        changed = stack.clone()
        changed[part] += 1
        assert count_differing(sample, changed, indices) == 1
    assert count_differing(sample, stack, indices) == 0


def test_a_sample_is_small_and_even():
    weight = torch.arange(20000.0).view(100, 200)
    indices = torch.arange(0, 20000, 2, dtype=torch.int32)
    sample = sample_of(weight, indices)
    assert sample.shape == (256,) and torch.equal(sample, weight.flatten()[indices[torch.arange(256) * 10000 // 256]])
    assert torch.equal(sample_of(weight.bfloat16(), indices), sample.bfloat16())


def test_a_sample_compares_bits():
    """A sign of zero counts, and one NaN equals itself."""
    weight, indices = torch.tensor([[0.0, float("nan"), 1.0]]), torch.arange(3, dtype=torch.int32)
    sample = sample_of(weight, indices)
    assert count_differing(sample, weight, indices) == 0
    weight[0, 0] = -0.0
    assert count_differing(sample, weight, indices) == 1


NOT_STRICT = StateDictOptions(strict=False)
SETUPS = {"matrix": dense_setup, "packed": packed_setup}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("first", SETUPS)
@pytest.mark.parametrize("second", SETUPS)
def test_matrix_and_packed_mode_check_each_others_states(first, second, dtype):
    """The right weights go on, others are refused before a value is changed."""
    model, optimizer = SETUPS[first](dtype=dtype)
    train_model(model, optimizer, range(2))
    saved = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    again, loaded = SETUPS[second](dtype=dtype)
    loaded.load_state_dict(saved[1])
    loss_of(again, 2).backward()
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(
        RuntimeError, match=rf"3 of 3 matrices differ, first a\.{'weight' if second == 'matrix' else 'val'}"
    ):
        loaded.step()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
    loaded.zero_grad()
    again.load_state_dict(saved[0])
    train_model(again, loaded, range(2, 4))
    train_model(model, optimizer, range(2, 4))
    for name, value in again.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=0, atol=1e-6 if dtype == FP32 else 1e-3), name


@pytest.mark.parametrize("setup", SETUPS)
def test_torchs_distributed_state_dict_keeps_the_sample(setup):
    """get_state_dict and set_state_dict take a step with zero gradients, and names for ids."""
    model, optimizer = SETUPS[setup]()
    train_model(model, optimizer, range(2))
    model_state, state = copy.deepcopy(get_state_dict(model, optimizer))
    assert all("weight_sample" in entry for entry in state["state"].values())
    again, loaded = SETUPS[setup]()
    set_state_dict(again, loaded, model_state_dict={}, optim_state_dict=copy.deepcopy(state), options=NOT_STRICT)
    loss_of(again, 2).backward()
    with pytest.raises(RuntimeError, match="3 of 3 matrices differ"):
        loaded.step()
    loaded.zero_grad()
    set_state_dict(again, loaded, model_state_dict=model_state, optim_state_dict=state)
    for m, o in ((model, optimizer), (again, loaded)):
        train_model(m, o, range(2, 4))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
