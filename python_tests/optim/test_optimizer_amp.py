"""Mixed precision: gradient scaling, skipped steps, fp32 masters of low-precision weights."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP16, FP32
from helpers.optimizers import OPTIONS, assert_same, make_weights, set_gradients, snapshot, train

from lift_kernels import LiftAdamW


def scaled_step(optimizer, scaler, weights, step, bad=None):
    """Take one step as under torch.amp; ``bad`` is put into one gradient, trained entry or not."""
    set_gradients(weights, step)
    for w in weights:
        w.grad *= scaler.get_scale() if scaler.is_enabled() else 1.0
    if bad is not None:
        weights[-1].grad.view(-1)[-1] = bad
    # This creates the scale on the device of the loss, as before backward.
    scaler.scale(torch.ones(1, device=weights[0].device))
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_skipped_step_changes_no_bit(backend, dtype, max_grad_norm, bad):
    """Weights, moments, masters and counts stay.

    The run equals one that leaves the skipped step out.
    """
    if dtype == BF16 and backend.device == "cuda":
        dtype = FP16  # On CUDA, torch's GradScaler takes no bf16 gradients. They need no scaling.

    def build():
        weights = make_weights(((24, 40), (33, 17), (40,)), dtype, backend.device)
        return weights, LiftAdamW(
            weights, **OPTIONS, max_grad_norm=max_grad_norm, refresh_interval=None, backend=backend.name
        )

    weights, optimizer = build()
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0, backoff_factor=1.0 - 1e-9)
    scaled_step(optimizer, scaler, weights, 0)
    before = snapshot(optimizer)
    scaled_step(optimizer, scaler, weights, 1, bad)
    after = snapshot(optimizer)
    before["steps_since_refresh of group 0"] = after["steps_since_refresh of group 0"]  # updated when it is read
    assert_same(after, before)
    scaled_step(optimizer, scaler, weights, 2)
    copies, other = build()
    scaler = torch.amp.GradScaler(backend.device, init_scale=1024.0)
    scaled_step(other, scaler, copies, 0)
    scaled_step(other, scaler, copies, 2)
    optimizer.state_dict()
    assert_same(snapshot(optimizer), snapshot(other))
    assert optimizer.state[weights[0]]["step"] == optimizer.state[weights[2]]["step"] == 2


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
def test_scaling_by_a_power_of_two_changes_no_bit(backend, max_grad_norm):
    shapes = ((24, 40), (33, 17), (40,))
    weights, copies = make_weights(shapes, device=backend.device), make_weights(shapes, device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, max_grad_norm=max_grad_norm, backend=backend.name)
    other = LiftAdamW(copies, **OPTIONS, max_grad_norm=max_grad_norm, backend=backend.name)
    scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**16)
    for step in range(3):
        scaled_step(optimizer, scaler, weights, step)
        train(other, [step])
        if max_grad_norm is not None:
            torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
    for w, t in zip(weights, copies):
        torch.testing.assert_close(w, t, rtol=0, atol=0 if max_grad_norm is None else 1e-7)


def test_unscaling_before_the_step(backend):
    """`scaler.unscale_` has divided the gradients already, and they are not divided again."""
    weights, copies = make_weights(device=backend.device), make_weights(device=backend.device)
    optimizer = LiftAdamW(weights, **OPTIONS, backend=backend.name)
    scaler = torch.amp.GradScaler(backend.device, init_scale=256.0)
    for step in range(2):
        set_gradients(weights, step)
        for w in weights:
            w.grad *= 256.0
        scaler.scale(torch.ones(1, device=backend.device))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(LiftAdamW(copies, **OPTIONS, backend=backend.name), range(2))
    assert all(torch.equal(w, t) for w, t in zip(weights, copies))


def refresh_steps(interval, skipped, steps, by_hand=()):
    """The steps (from 1) after which a mask was made, if the steps ``skipped`` are infinite."""
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS, refresh_interval=interval)
    optimizer.refresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    calls, seen = [], []
    optimizer.selection = lambda w, k: (calls.append(1), torch.arange(k, dtype=torch.int32))[1]
    for step in range(1, steps + 1):
        scaled_step(optimizer, scaler, weights, step, float("inf") if step in skipped else None)
        if calls:
            seen.append(step)
        if step in by_hand:
            optimizer.refresh()
        calls.clear()
    return seen


def test_skipped_steps_do_not_count_to_the_schedule():
    assert refresh_steps(3, (), 9) == [3, 6, 9]
    assert refresh_steps(3, (1, 5), 9) == [4, 8]
    assert refresh_steps(3, (3,), 9) == [4, 7]
    assert refresh_steps(2, (1, 2, 3), 8) == [5, 7]


def test_a_refresh_by_hand_forgets_steps_skipped_before():
    assert refresh_steps(3, (1, 2), 9, by_hand=(2,)) == [5, 8]


def test_found_inf_of_several_devices_counts_once():
    """GradScaler adds the flags of all devices, so the flag may be two."""
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS, refresh_interval=10)
    train(optimizer, range(3))
    optimizer.found_inf = torch.tensor(2.0)
    before = [w.detach().clone() for w in weights]
    train(optimizer, [3])
    assert all(torch.equal(w, b) for w, b in zip(weights, before))
    assert optimizer.state_dict()["param_groups"][0]["steps_since_refresh"] == 3


def test_a_group_that_did_not_step_loses_no_count():
    """A skipped step of one group does not concern another that had no gradients."""
    weights = make_weights()
    optimizer = LiftAdamW([{"params": [w]} for w in weights], **OPTIONS, refresh_interval=10)
    train(optimizer, range(3))
    weights[1].grad = None
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert [group["steps_since_refresh"] for group in optimizer.state_dict()["param_groups"]] == [3, 3]


def test_dense_low_precision_gradients_are_scaled_in_fp32(backend):
    """A dense parameter has fp16 gradients.

    Unscaling must not lose them below fp16's smallest numbers.
    """
    weight = torch.nn.Parameter(torch.zeros(8, dtype=FP16, device=backend.device))
    optimizer = LiftAdamW([weight], lr=0.01, betas=(0.0, 0.0), eps=1e-9, backend=backend.name)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**15 * 3), torch.tensor(0.0)
    weight.grad = torch.full((8,), 30000.0, dtype=FP16, device=backend.device)
    optimizer.step()
    expected = torch.tensor(30000.0 / (2.0**15 * 3)).to(FP16)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"].cpu(), expected.expand(8), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_small_steps_add_up_in_the_master(backend, dtype):
    """Updates below half an ulp of the weight vanish without a master and add up with one."""
    moved = {}
    for master in ("fp32", None):
        weight = torch.nn.Parameter(torch.ones(6, 8, dtype=dtype, device=backend.device))
        optimizer = LiftAdamW([weight], lr=2e-4, density=1.0, master=master, backend=backend.name)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[master] = weight.detach().float().cpu()
    assert torch.equal(moved[None], torch.ones(6, 8))
    torch.testing.assert_close(moved["fp32"], torch.full((6, 8), 0.99), rtol=0, atol=2.0**-9)


def test_weights_loaded_behind_the_back(backend, caplog):
    """`load_best_model_at_end` loads weights like this.

    The master follows model.load_state_dict, but only at entries whose values differ.
    """
    model = torch.nn.Linear(40, 24, bias=False, dtype=BF16, device=backend.device)
    with torch.no_grad():
        model.weight.copy_(make_weights(((24, 40),), BF16)[0])
    optimizer = LiftAdamW(model.parameters(), **OPTIONS, refresh_interval=None, backend=backend.name)
    train(optimizer, range(2))
    best = {name: value.clone() for name, value in model.state_dict().items()}
    index = optimizer.state[model.weight]["indices"].long()
    master = optimizer.state[model.weight]["master"].clone()
    model.load_state_dict(best)  # the same values: nothing is lost and nothing is logged
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [2])
    assert torch.equal(optimizer.state[model.weight]["master"], master) and not caplog.records
    optimizer.param_groups[0]["lr"] = 0.05
    train(optimizer, range(3, 6))
    assert not torch.equal(model.weight.detach(), best["weight"])
    model.load_state_dict(best)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, [6])
    assert torch.equal(model.weight.detach(), best["weight"]), "a stale master undid the loaded weights"
    assert torch.equal(optimizer.state[model.weight]["master"], best["weight"].flatten()[index].float())
    assert len(caplog.records) == 1 and "changed outside the optimizer" in caplog.records[0].getMessage()


def test_a_refresh_sees_outside_changes(backend):
    """The new mask comes from the new values.

    Entries that stay take the new values into their master.
    """
    weight = make_weights(((24, 40),), BF16, backend.device)[0]
    optimizer = LiftAdamW([weight], **OPTIONS, refresh_interval=None, backend=backend.name)
    train(optimizer, range(2))
    with torch.no_grad():
        weight.mul_(1.5)
    optimizer.refresh()
    entry = optimizer.state[weight]
    assert torch.equal(entry["master"], weight.detach().flatten()[entry["indices"].long()].float())


@pytest.mark.parametrize("schedule", ["all", "spread"])
def test_an_overflow_makes_no_mask_of_its_gradients(schedule):
    """GradScaler starts at a scale of 2^16, so its first steps often overflow. They are skipped."""
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = LiftAdamW([weight], selection="gradient", refresh_interval=1, refresh_schedule=schedule, density=0.25)
    scaler, before = torch.amp.GradScaler("cpu"), weight.detach().clone()
    for first in (True, False):
        grads = [torch.inf, 1.0] if first else [torch.inf]
        for value in grads:
            scaler.scale(torch.ones(()))
            weight.grad = torch.arange(64.0).view(8, 8) * value + value
            scaler.step(optimizer)
            scaler.update()
        if first:
            assert optimizer.state[weight]["indices"].tolist() == list(range(48, 64))
            before = weight.detach().clone()
    assert torch.equal(weight.detach(), before) and optimizer.state[weight]["step"] == 1


def test_the_norm_takes_double_precision_too():
    """Dense parameters may be fp64."""
    weight, vector = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = LiftAdamW([weight, vector], max_grad_norm=1.0, density=1.0)
    weight.grad, vector.grad = torch.full((4, 4), 2.0), torch.full((3,), 4.0, dtype=torch.float64)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx((16 * 4 + 3 * 16) ** 0.5)
