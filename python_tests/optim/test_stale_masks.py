"""First masks that `pack_gradients` made from other weights than the model has later."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.packed_training import MASK, batch, packed_setup
from helpers.packed_training import train as train_model
from helpers.small_models import ThreeLinears
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients


def other_weights(dtype=FP32):
    torch.manual_seed(21)
    return {name: 0.1 * torch.randn_like(value) for name, value in ThreeLinears(dtype).state_dict().items()}


def test_masks_that_were_packed_before_the_weights_were_loaded_are_named(caplog):
    """A refresh gives those of the loaded weights, before the first step or after it."""
    model, optimizer = packed_setup(refresh_interval=None)
    model.load_state_dict(other_weights())
    train_model(model, optimizer, [0])
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "3 of 3 masks were made by pack_gradients from other weights than the present"
    )
    assert "e.g. that of a.values" in record.getMessage() and "optimizer.refresh(drop_gradients=True)" in caplog.text
    train_model(model, optimizer, [1])
    assert len(caplog.records) == 1


def test_a_first_refresh_makes_masks_that_were_packed_from_other_weights_again(caplog):
    model, optimizer = packed_setup(refresh_interval=None)
    model.load_state_dict(other_weights())
    optimizer.refresh()
    right = ThreeLinears()
    right.load_state_dict(other_weights())
    expected, fresh = packed_setup(refresh_interval=None, model=right)
    for name in ("a", "b", "c"):
        assert torch.equal(getattr(model, name).indices, getattr(expected, name).indices), name
    for m, o in ((model, optimizer), (expected, fresh)):
        train_model(m, o, range(2))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert not caplog.records


def test_masks_of_hooked_parameters_are_compared_as_well(caplog):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stack = nn.Parameter(torch.randn(3, 24, 10))
            self.head = nn.Linear(10, 4)

        def forward(self, x):
            return self.head(torch.einsum("ti,eio->to", x, self.stack))

    model = Scaled()
    optimizer = LiftAdamW(
        pack_gradients(model, extra="stack", rank=4, density=0.2, freeze_rest=True), rank=4, density=0.2
    )
    with torch.no_grad():
        model.stack[2] *= -1.5
    model(batch(0)).sum().backward()
    optimizer.step()
    assert "1 of 2 masks were made by pack_gradients from other weights" in caplog.text
    assert "e.g. that of stack" in caplog.text


def test_a_mask_of_the_present_weights_says_nothing_and_stays(caplog):
    """Also where the model was converted, or a checkpoint brought the same values."""
    model, optimizer = packed_setup(refresh_interval=None)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    lists = {name: getattr(model, name).indices.clone() for name in ("a", "b", "c")}
    optimizer.refresh()
    assert all(torch.equal(getattr(model, name).indices, indices) for name, indices in lists.items())
    converted, optimizer = packed_setup(refresh_interval=None)
    converted.to(BF16)
    train_model(converted, optimizer, [0])
    assert not caplog.records


def test_random_masks_fit_all_weights(caplog):
    random = {"selection": "random"}
    model, optimizer = packed_setup(mask=MASK | random, **random)
    model.load_state_dict(other_weights())
    train_model(model, optimizer, [0])
    assert not caplog.records and optimizer.state[model.a.values]["step"] == 1


def test_a_resumed_packed_run_says_nothing(caplog):
    """Its first masks belong to a random model, and the state brings others."""
    model, optimizer = packed_setup()
    model.load_state_dict(other_weights())
    with caplog.at_level(logging.ERROR, logger="lift_kernels"):
        train_model(model, optimizer, range(2))
    again, resumed = packed_setup()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (again, resumed)):
        train_model(m, o, range(2, 4))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize("state", ["own", "trained", "refresh"])
def test_a_trained_state_replaces_masks_of_other_weights_without_a_word(caplog, state):
    """As accelerate does it: it loads the optimizer's own state before that of a checkpoint."""
    trained, optimizer = packed_setup(refresh_interval=None)
    train_model(trained, optimizer, range(2))
    model, loaded = packed_setup(refresh_interval=None)
    model.load_state_dict(other_weights() if state != "trained" else trained.state_dict())
    loaded.load_state_dict(loaded.state_dict())
    if state == "trained":
        loaded.load_state_dict(optimizer.state_dict())
    elif state == "refresh":
        loaded.refresh()
    assert not caplog.records
    copied, model = copy.deepcopy((loaded, model))
    for m, o in ((model, copied), (model, copied)):
        train_model(m, o, [2])
    assert [record.getMessage().split(" were")[0] for record in caplog.records] == (
        ["3 of 3 masks"] if state == "own" else []
    )
    if state == "trained":
        train_model(trained, optimizer, [2])
        train_model(trained, optimizer, [2])
        assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
