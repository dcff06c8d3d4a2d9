"""What a step makes again, and when: the table of matrices, the buckets, the views of the state."""

from __future__ import annotations

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.optimizers import OPTIONS, make_weights, set_gradients, train
from helpers.packed_training import MASK, loss_of, packed_setup
from helpers.packed_training import train as train_packed
from helpers.small_models import ThreeLinears
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients, unpack


def made(optimizer):
    """The objects that an unchanged step keeps."""
    table = optimizer._table
    return [id(table.refs), id(table.parameters), *map(id, table.refs), *(id(b) for b, _ in optimizer._sweep._buckets)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_unchanged_step_makes_nothing_again(dtype):
    weights = make_weights(dtype=dtype)
    optimizer = LiftAdamW(weights, refresh_interval=2, max_grad_norm=1.0, **OPTIONS)
    train(optimizer, [0])
    before, addresses = made(optimizer), {p: optimizer.state[p]["exp_avg"].data_ptr() for p in weights}
    train(optimizer, range(1, 6))  # with refreshes
    assert made(optimizer) == before
    assert {p: optimizer.state[p]["exp_avg"].data_ptr() for p in weights} == addresses
    assert all(optimizer.state[p]["step"].item() == 6 for p in weights)


def test_an_unchanged_packed_step_makes_nothing_again():
    model, optimizer = packed_setup(refresh_interval=2)
    train_packed(model, optimizer, range(1))
    before = made(optimizer)
    train_packed(model, optimizer, range(1, 5))
    assert made(optimizer) == before


def test_a_step_counts_as_a_write_of_the_values():
    """They are views of the arena with counters of their own, which autograd and EMA tools read."""
    model, optimizer = packed_setup(refresh_interval=None)
    train_packed(model, optimizer, range(1))
    before = model.a.values._version, model.a.weight._version
    train_packed(model, optimizer, range(1, 3))
    assert model.a.values._version >= before[0] + 2 and model.a.weight._version >= before[1] + 2


def test_a_bucket_keeps_no_gradient_after_the_step():
    weights = make_weights()
    optimizer = LiftAdamW(weights, **OPTIONS)
    train(optimizer, range(2))
    assert [bucket.grads for bucket, _ in optimizer._sweep._buckets] == [[]] and optimizer._sweep._grads == []


def test_matrices_without_a_gradient_are_left_out():
    """Which ones have a gradient may change at every step; the others keep all their bits."""
    weights = make_weights()
    optimizer = LiftAdamW(weights, refresh_interval=None, **OPTIONS)
    train(optimizer, [0])
    for step, left_out in enumerate((0, 1, 1, 0), start=1):
        set_gradients(weights, step)
        weights[left_out].grad = None
        before = [w.detach().clone() for w in weights]
        counts = [optimizer.state[w]["step"].item() for w in weights]
        optimizer.step()
        for i, w in enumerate(weights):
            assert torch.equal(w, before[i]) == (i == left_out)
            assert optimizer.state[w]["step"].item() == counts[i] + (i != left_out)


def test_gradients_of_another_dtype_go_to_a_bucket_of_their_own():
    """One step with mixed gradients gives the bits of one step with each dtype alone."""
    results = []
    for mixed in (True, False):
        weights = make_weights(dtype=BF16)
        optimizer = LiftAdamW(weights, refresh_interval=None, **OPTIONS)
        train(optimizer, [0])
        set_gradients(weights, 1)
        if mixed:
            weights[1].grad_dtype = None
            weights[1].grad = weights[1].grad.float()
        optimizer.step()
        assert len(optimizer._sweep._buckets) == 1 + mixed
        train(optimizer, [2])
        results.append([w.detach().clone() for w in weights])
    assert all(map(torch.equal, *results))


def test_groups_may_get_other_parameters():
    """Tools such as accelerate put their own parameters into the groups."""
    weights = make_weights()
    optimizer = LiftAdamW([weights[0]], refresh_interval=None, **OPTIONS)
    train(optimizer, [0])
    optimizer.param_groups[0]["params"][0] = weights[1]
    before = [w.detach().clone() for w in weights]
    train(optimizer, [1])
    assert torch.equal(weights[0], before[0]) and not torch.equal(weights[1], before[1])
    optimizer.param_groups[0]["params"].append(weights[0])  # it comes back to its state
    train(optimizer, [2])
    assert optimizer.state[weights[0]]["step"].item() == 2 == optimizer.state[weights[1]]["step"].item()
    assert [ref.parameter is p for ref, p in zip(optimizer._table.refs, weights[::-1])] == [True, True]


def test_a_group_added_later_is_trained():
    weights = make_weights()
    optimizer = LiftAdamW([weights[0]], **OPTIONS)
    train(optimizer, [0])
    optimizer.add_param_group({"params": [weights[1]], "lr": 0.5})
    before = weights[1].detach().clone()
    train(optimizer, [1])
    assert (weights[1] - before).abs().max() > 0.1
    assert len({id(ref.arena) for ref in optimizer._table.refs}) == 1  # one arena, two launches
    assert len(optimizer._sweep._buckets) == 2


def test_a_matrix_that_gets_a_hook_later_is_refused():
    """Its gradient would belong to other entries. After `unpack` it is trained again."""
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.MultiheadAttention(16, 2, bias=False))
    weight = model[1].in_proj_weight
    optimizer = LiftAdamW([("in_proj", weight)], refresh_interval=None, rank=4, density=0.2)

    def step():
        before = weight.detach().clone()
        optimizer.zero_grad()
        x = model[0](torch.ones(3, 1, 24))
        model[1](x, x, x)[0].square().sum().backward()
        optimizer.step()
        return int((weight != before).sum())

    k = round(0.2 * weight.numel())
    assert 0 < step() <= k
    pack_gradients(model, include="0", extra="in_proj", rank=4, density=0.2)
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="in_proj got packed gradients after the optimizer had chosen its entries"):
        step()
    assert torch.equal(weight, before)
    unpack(model)
    assert 0 < step() <= k


def test_layers_that_get_another_weight_are_followed():
    """load_state_dict(assign=True) brings a new parameter; the step trains it and not the old."""
    model, optimizer = packed_setup(refresh_interval=None)
    train_packed(model, optimizer, range(2))
    old = model.a.weight
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    before, kept = model.a.weight.detach().clone(), old.detach().clone()
    train_packed(model, optimizer, [2])
    assert model.a.weight is not old and torch.equal(old, kept)
    index = model.a.indices.long()
    assert torch.equal(model.a.weight.view(-1)[index], model.a.values) and not torch.equal(model.a.weight, before)


def test_a_new_mask_of_another_length_shows_new_views():
    model, optimizer = packed_setup(refresh_interval=None)
    train_packed(model, optimizer, range(2))
    k = model.a.values.numel()
    optimizer.param_groups[0]["density"] = 2 * MASK["density"]
    optimizer.refresh()
    assert model.a.values.numel() == model.a.indices.numel() == optimizer.state[model.a.values]["indices"].numel() > k
    assert model.a.values.data_ptr() == optimizer.state[model.a.values]["master"].data_ptr()
    start = model.a.values.detach().clone()
    train_packed(model, optimizer, [2])
    assert not torch.equal(model.a.values, start)


def test_a_refresh_without_warm_start_takes_old_bases_away():
    (weight,) = make_weights(((24, 40),))
    optimizer = LiftAdamW([weight], refresh_interval=None, mask_method="chebyshev", **OPTIONS)
    train(optimizer, [0])
    assert {"basis", "threshold"} <= optimizer.state[weight].keys()
    optimizer.warm_start = None
    optimizer.refresh()
    assert not {"basis", "threshold"} & optimizer.state[weight].keys()


def test_copies_of_packed_layers_are_followed_by_no_optimizer_of_the_original():
    model, optimizer = packed_setup(refresh_interval=None)
    train_packed(model, optimizer, range(2))
    other = ThreeLinears()
    pack_gradients(other, freeze_rest=True, **MASK)
    loss_of(other, 0).backward()
    before = [p.detach().clone() for p in other.parameters()]
    train_packed(model, optimizer, range(2, 4))
    assert all(map(torch.equal, before, other.parameters()))


@pytest.mark.parametrize("extra", [None, "in_proj"])
def test_a_second_optimizer_on_packed_gradients_refuses_the_first(extra):
    """The layers have its masks, so entries of the first would get gradients of others."""
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.MultiheadAttention(16, 2, bias=False))
    groups = pack_gradients(model, extra=extra, exclude="out_proj" if extra is None else "0", rank=4, density=0.2)
    first, second = (LiftAdamW([dict(group) for group in groups], refresh_interval=None) for _ in range(2))

    def step(optimizer):
        x = model[0](torch.ones(3, 1, 24))
        model[1](x, x, x)[0].square().sum().backward()
        optimizer.step()
        model.zero_grad()

    step(first)
    step(first)
    step(second)
    second.refresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="got packed gradients after .* another LiftAdamW.* make one optimizer"):
        step(first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    second.zero_grad()
    model.zero_grad()
    step(second)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_that_no_longer_share_a_weight_are_refused():
    """load_state_dict(assign=True) gives each layer a weight of its own."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    optimizer = LiftAdamW(pack_gradients(model, rank=4, density=0.2), refresh_interval=None)
    saved = {name: value.clone() for name, value in model.state_dict().items()}

    def step():
        model(torch.ones(3, 16)).square().sum().backward()
        optimizer.step()
        model.zero_grad()

    step()
    model.load_state_dict(saved, assign=True)
    with pytest.raises(RuntimeError, match="0.values: .* shared its weight with .*; tie both again"):
        step()
    model[2].weight = model[0].weight
    before = model[2].weight.detach().clone()
    step()
    assert model[2].weight is model[0].weight and not torch.equal(model[2].weight, before)
