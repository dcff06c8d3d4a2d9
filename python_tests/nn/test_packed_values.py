"""The trained values follow a refresh, a changed weight and another optimizer."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.optimizers import assert_same, snapshot
from helpers.packed_training import MASK, loss_of, packed_setup, train
from helpers.small_models import ThreeLinears
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients


def test_values_are_the_optimizers_own_slice():
    """There is no second copy before or after a refresh, and 16 bytes of state per entry."""
    model, optimizer = packed_setup("native-cpu")
    train(model, optimizer, range(2))
    for layer in (model.a, model.b, model.c):
        state = optimizer.state[layer.values]
        assert (
            layer.values.data_ptr() == state["master"].data_ptr()
            and layer.indices.data_ptr() == state["indices"].data_ptr()
        )
        assert isinstance(layer.values, nn.Parameter) and layer.values.is_leaf
    addresses = [layer.values.data_ptr() for layer in (model.a, model.b, model.c)]
    optimizer.refresh()
    assert addresses == [layer.values.data_ptr() for layer in (model.a, model.b, model.c)]
    entries = sum(layer.indices.numel() for layer in (model.a, model.b, model.c))
    assert 16 * entries <= optimizer.state_bytes() <= 16 * (entries + 3 * 64) + 12


def test_a_refresh_moves_the_values():
    """They are the weight's values at the new list, and the next gradient fits.

    Entries that leave keep the weight they have.
    """
    model, optimizer = packed_setup("native-cpu", refresh_interval=None)
    train(model, optimizer, range(4))
    with torch.no_grad():
        model.a.weight.mul_(torch.linspace(0.1, 3, 24))  # another mask
    before, old = model.a.weight.detach().clone(), model.a.indices.clone()
    optimizer.refresh()
    assert not torch.equal(model.a.indices, old) and torch.equal(model.a.weight.detach(), before)
    assert torch.equal(model.a.values, before.view(-1)[model.a.indices.long()])
    train(model, optimizer, [4])
    moved = (model.a.weight != before).view(-1).nonzero().flatten().int()
    assert torch.equal(moved, model.a.indices)


def test_a_refresh_in_the_middle_of_an_accumulation():
    model, optimizer = packed_setup()
    train(model, optimizer, range(2))
    loss_of(model, 5).backward()
    before = snapshot(optimizer)
    wanted = r"a\.values has a packed gradient.*step\(\) and zero_grad\(\), or by refresh\(drop_gradients=True\)"
    with pytest.raises(RuntimeError, match=wanted):
        optimizer.refresh()
    assert_same(snapshot(optimizer), before)
    assert model.a.values.grad is not None
    optimizer.refresh(drop_gradients=True)
    assert all(p.grad is None for p in model.parameters())


def test_a_scheduled_refresh_drops_consumed_gradients():
    model, optimizer = packed_setup(refresh_interval=2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert (model.a.values.grad is None) == (step == 1)


def test_a_refresh_between_forward_and_backward_is_noticed():
    model, optimizer = packed_setup()
    train(model, optimizer, range(2))
    loss = loss_of(model, 5)
    with torch.no_grad():
        model.b.weight.mul_(torch.linspace(0.1, 3, 40))
    loss = loss_of(model, 5)
    optimizer.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_weight_changed_behind_the_layers_back(dtype, caplog):
    """The values follow, so that a stale one undoes nothing. One warning names the layer."""
    model, optimizer = packed_setup("native-cpu", dtype, refresh_interval=None)
    train(model, optimizer, range(2))
    changed = torch.full_like(model.b.weight, 0.25)
    with torch.no_grad():
        model.b.weight.copy_(changed)
    optimizer.param_groups[0]["lr"] = 0.0
    with caplog.at_level(logging.WARNING, logger="lift_kernels"):
        train(model, optimizer, range(2, 4))
    assert torch.equal(model.b.weight, changed) and model.b.values.eq(0.25).all()
    (record,) = caplog.records
    assert record.getMessage().startswith("b.values was changed outside the optimizer;")


def test_loading_a_model_between_steps(caplog):
    model, optimizer = packed_setup("native-cpu", refresh_interval=None)
    best = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, optimizer, range(3))
    for assign in (False, True):
        model.load_state_dict({k: v.clone() for k, v in best.items()}, assign=assign)
        optimizer.param_groups[0]["lr"] = 0.0
        train(model, optimizer, [3])
        assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
        optimizer.param_groups[0]["lr"] = 0.01
        train(model, optimizer, [4])
        assert not torch.equal(model.a.weight, best["a.weight"])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_another_optimizer_trains_the_values_until_a_refresh(dtype, caplog):
    """The weight follows the values, and values follow a changed weight.

    LiftAdamW does not exchange entries that another optimizer trains.
    """
    model = ThreeLinears(dtype)
    pack_gradients(model, freeze_rest=True, **MASK)
    start = model.a.weight.detach().clone()
    optimizer = torch.optim.SGD([model.a.values, model.b.values], lr=0.5)
    loss_of(model, 0).backward()
    expected = model.a.values.detach() - 0.5 * model.a.values.grad
    optimizer.step()
    assert torch.equal(model.a.values, expected)
    index = model.a.indices.long()
    assert torch.equal(model.a.weight.view(-1)[index], expected.to(dtype))
    others = torch.ones(start.numel(), dtype=torch.bool)
    others[index] = False
    assert torch.equal(model.a.weight.view(-1)[others], start.view(-1)[others])
    with torch.no_grad():
        model.b.weight.fill_(0.5)
    model.b.values.grad.zero_()
    with caplog.at_level(logging.WARNING, logger="lift_kernels"):
        optimizer.step()
    assert model.b.weight.eq(0.5).all() and model.b.values.eq(0.5).all()
    assert [r.getMessage().split(" was changed")[0] for r in caplog.records] == ["b"]
    model.zero_grad()
    lift = LiftAdamW(lift_param_groups(model), **MASK)
    with pytest.raises(RuntimeError, match=r"a\.values is trained by SGD too"):
        lift.refresh()
