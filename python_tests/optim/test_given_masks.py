"""Masks that `pack_gradients` has made: copies and states before the first step, other groups."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients, unpack


class Stack(nn.Module):
    """Two matrices in one parameter, which no packed layer can hold."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(2, 8, 30))

    def forward(self, x):
        return torch.einsum("td,eod->to", x, self.matrices)


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 30), Stack())
    groups = pack_gradients(model, extra="matrices", density=0.2, rank=4, **options)
    return model, LiftAdamW(groups, lr=1e-2, rank=4, density=0.2)


def train(model, optimizer, steps=2):
    for step in range(steps):
        x = torch.randn(3, 30, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.refresh()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_copy_packs_the_same_gradients(copied, steps):
    """torch copies no hooks. A dense gradient would be kept in silence."""
    model, optimizer = make()
    if steps:
        train(model, optimizer, steps)
    other, others = copied((model, optimizer))
    other(torch.ones(3, 30)).square().mean().backward()
    assert other[1].matrices.grad is None and len(other[1].matrices.lift_grad) == 2 * 48
    others.zero_grad()
    train(model, optimizer)
    train(other, others)
    assert same(model, other)
    assert [m.method for m in others.last_refresh.matrices] == [m.method for m in optimizer.last_refresh.matrices]
    unpack(other)
    assert type(other[0]) is nn.Linear
    other(torch.ones(3, 30)).square().mean().backward()
    assert other[1].matrices.grad is not None


def test_a_state_before_the_first_step_holds_the_masks():
    """A fresh model chose its entries from other weights."""
    model, optimizer = make(seed=0)
    other, others = make(seed=1)
    assert not torch.equal(model[0].indices, other[0].indices)
    other.load_state_dict(model.state_dict())
    others.load_state_dict(optimizer.state_dict())
    assert torch.equal(model[0].indices, other[0].indices)
    assert torch.equal(model[1].matrices.lift_indices, other[1].matrices.lift_indices)
    train(model, optimizer)
    train(other, others)
    assert same(model, other)


def test_a_state_of_masks_from_older_weights_says_so(caplog):
    model, optimizer = make(seed=0)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with caplog.at_level(logging.WARNING, "lift_kernels"):
        optimizer.state_dict()
        train(model, optimizer)
    stale = [record.getMessage() for record in caplog.records if "made by pack_gradients from other" in record.message]
    assert len(stale) == 1 and stale[0].startswith("1 of 2 masks ") and "0.values" in stale[0]


def test_random_masks_stay_when_groups_come_in_another_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Stack(), nn.Linear(8, 8))
    (group,) = pack_gradients(model, extra="matrices", density=0.3, selection="random", seed=4)
    rest = {key: value for key, value in group.items() if key != "params"}
    groups = [{**rest, "params": group["params"][i::2], "lr": 10.0**-i} for i in (1, 0)]
    optimizer = LiftAdamW(groups, selection="random", seed=4)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    before = [layer.indices.clone() for layer in layers], model[2].matrices.lift_indices.clone()
    optimizer, model = copy.deepcopy((optimizer, model))
    for _ in range(2):
        optimizer.refresh()
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert all(torch.equal(layer.indices, was) for layer, was in zip(layers, before[0]))
    assert torch.equal(model[2].matrices.lift_indices, before[1])


def test_options_of_the_optimizer_that_no_group_follows_are_said(caplog):
    model = nn.Sequential(nn.Linear(30, 30))
    groups = pack_gradients(model, density=0.1)
    with caplog.at_level(logging.WARNING, "lift_kernels"):
        LiftAdamW(groups)
        LiftAdamW(groups, density=0.1)
        assert not caplog.records
        LiftAdamW(groups, density=0.5, rank=3)
    assert [record.getMessage().split(" has no effect")[0] for record in caplog.records] == [
        "rank=3 of LiftAdamW",
        "density=0.5 of LiftAdamW",
    ]
