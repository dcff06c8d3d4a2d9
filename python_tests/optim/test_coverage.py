"""An optimizer says once which of its parameters get no gradient, and nothing where all do."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers.optimizers import OPTIONS, make_weights, set_gradients, train
from helpers.packed_training import dense_setup, loss_of, packed_setup
from helpers.packed_training import train as train_model
from helpers.small_models import ThreeLinears
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients, unpack

IDLE = "no parameter has a gradient, so this step changes nothing: "


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "lift_kernels"]


def test_a_frozen_model_is_said_once(caplog):
    model = ThreeLinears().requires_grad_(False)
    optimizer = LiftAdamW(lift_param_groups(model), **OPTIONS)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
    (message,) = messages(caplog)
    assert message.startswith(f"{IDLE}3 of 3 parameters of LiftAdamW, with 100 % of their weights, are frozen")
    assert "e.g. a.weight; call requires_grad_(True) on them, or make" in message and "freeze_rest=True)" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_remedy_and_the_second_work(caplog):
    model = ThreeLinears().requires_grad_(False)
    LiftAdamW(lift_param_groups(model), **OPTIONS).step()
    for groups in (lift_param_groups(model, freeze_rest=True), lift_param_groups(model.requires_grad_(True))):
        caplog.clear()
        train_model(model, LiftAdamW(groups, **OPTIONS), [0])
        assert not messages(caplog)


def test_some_frozen_and_some_unused_parameters_get_a_line_each(caplog):
    model = ThreeLinears()
    model.a.weight.requires_grad_(False)
    unused = nn.Parameter(torch.zeros(16, 10))
    named = [*model.named_parameters(), ("left_out.weight", unused)]
    optimizer = LiftAdamW(named, **OPTIONS)
    train_model(model, optimizer, range(3))
    frozen, without = messages(caplog)
    total = sum(p.numel() for _, p in named)
    assert frozen.startswith("1 of 6 parameters of LiftAdamW") and "are frozen" in frozen and "e.g. a.weight;" in frozen
    assert f"with {100 * 960 / total:.3g} % of their weights" in frozen
    assert without.startswith("1 of 6 parameters of LiftAdamW") and "e.g. left_out.weight;" in without
    assert f"with {100 * 160 / total:.3g} % of their weights, have no gradient at this step" in without


def test_a_first_step_without_any_gradient_does_not_hide_the_next_one(caplog):
    """As some loops take it for their scheduler."""
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS)
    optimizer.step()
    optimizer.step()
    (message,) = messages(caplog)
    assert message.startswith(f"{IDLE}2 of 2 parameters") and "have no gradient" in message
    assert "call loss.backward() before step()" in message and "experts" not in message
    set_gradients(weights[:1], 0)
    optimizer.step()
    assert messages(caplog)[1].startswith("1 of 2 parameters") and "e.g. parameter 1 of group 0" in messages(caplog)[1]
    train(optimizer, [1])
    assert len(messages(caplog)) == 2


class Experts(nn.Module):
    """Each token goes to one expert."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x, chosen):
        return sum(self.experts[i](x) for i in chosen).square().mean()


def test_experts_that_no_token_reached_are_said_to_be_all_right(caplog):
    model = Experts()
    optimizer = LiftAdamW(lift_param_groups(model), rank=2, density=0.2)
    for chosen in ([0, 2], [1, 3]):
        model(torch.ones(2, 8), chosen).backward()
        optimizer.step()
        optimizer.zero_grad()
    (message,) = messages(caplog)
    assert message.startswith("2 of 4 parameters of LiftAdamW, with 50 %") and "e.g. experts.1.weight" in message
    assert "right for experts that no token has reached" in message


@pytest.mark.parametrize("setup", [dense_setup, packed_setup])
@pytest.mark.parametrize("micro", [1, 3])
def test_ordinary_training_says_nothing(setup, micro, caplog):
    model, optimizer = setup()
    train_model(model, optimizer, range(3), micro)
    assert not caplog.records


def test_packed_layers_that_are_frozen_later_count_the_weights_of_their_matrix(caplog):
    model, optimizer = packed_setup()
    model.a.values.requires_grad_(False)
    train_model(model, optimizer, [0])
    (message,) = messages(caplog)
    assert message.startswith(f"1 of 3 parameters of LiftAdamW, with {100 * 960 / (960 + 1320 + 561):.3g} % of their")
    assert "e.g. a.values;" in message


@pytest.mark.parametrize("interrupt", [copy.deepcopy, None])
def test_a_copy_does_not_say_it_again(interrupt, caplog):
    """Nor does an optimizer that loads a state."""
    model = ThreeLinears()
    model.a.weight.requires_grad_(False)
    optimizer = LiftAdamW(lift_param_groups(model), **OPTIONS)
    train_model(model, optimizer, [0])
    assert len(messages(caplog)) == 1
    if interrupt is None:
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        model, optimizer = interrupt((model, optimizer))
    loss_of(model, 1).backward()
    optimizer.step()
    assert len(messages(caplog)) == 1


def test_stacks_that_are_trained_densely_are_said(caplog):
    """As by ``LiftAdamW(model.parameters())`` of a mixture of experts."""
    experts, kernel = nn.Parameter(torch.ones(4, 16, 20)), nn.Parameter(torch.ones(16, 16, 3))
    with caplog.at_level(logging.WARNING, "lift_kernels"):
        LiftAdamW([{"params": [("experts", experts), ("conv.weight", kernel)], "lift": False}])
        LiftAdamW([{"params": [("experts", experts)], "lift": True}])
        assert not caplog.records
        LiftAdamW([("experts", experts), ("conv.weight", kernel)])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("1 3-D parameters are trained densely, for example experts; a group with lift=True ")


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_packed_after_its_optimizer_is_refused(steps):
    """Its weights would get no gradient any more, and no step would change anything."""
    model = ThreeLinears()
    optimizer = LiftAdamW(lift_param_groups(model), **OPTIONS)
    train_model(model, optimizer, range(steps))
    pack_gradients(model, rank=4)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward()
    refusal = "a.weight got packed gradients after the optimizer was made, .*; call pack_gradients first"
    for call in (optimizer.step, lambda: optimizer.refresh(drop_gradients=True)):
        with pytest.raises(RuntimeError, match=refusal):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unpack(model)
    train_model(model, optimizer, [steps])
    assert not torch.equal(model.a.weight, before["a.weight"])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_unpacked_before_its_last_step_is_refused(steps):
    model = ThreeLinears()
    groups = pack_gradients(model, rank=4)
    optimizer = LiftAdamW(groups, **OPTIONS)
    train_model(model, optimizer, range(steps))
    unpack(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="a.values is no longer of a packed layer, because unpack was called"):
        optimizer.step()
    with pytest.raises(
        ValueError, match="a.values: LIFT trains .*; pass lift=False .*, or make groups of pack_gradients"
    ):
        LiftAdamW([{"params": [("a.values", torch.nn.Parameter(torch.zeros(9)))], "lift": True}])
    assert len(optimizer.state_dict()["state"]) == 3


def test_the_parameters_of_a_packed_model_may_all_be_given():
    """The weights of packed layers are among them, and their values are too."""
    model = ThreeLinears()
    pack_gradients(model, rank=4)
    before = model.a.weight.detach().clone()
    train_model(model, LiftAdamW(model.named_parameters(), **OPTIONS), [0])
    assert not torch.equal(model.a.weight, before)


def test_weights_that_values_train_are_not_missed(caplog):
    """As of ``LiftAdamW(model.named_parameters())`` for a packed model."""
    model, _ = packed_setup()
    before = copy.deepcopy(model.state_dict())
    optimizer = LiftAdamW(model.named_parameters(), **OPTIONS)
    model.b.values.requires_grad_(False)
    train_model(model, optimizer, range(2))
    (message,) = messages(caplog)
    assert message.startswith("3 of 5 parameters") and "e.g. b.values; " in message  # two frozen biases and b
    assert torch.equal(model.b.weight, before["b.weight"]) and not torch.equal(model.a.weight, before["a.weight"])
