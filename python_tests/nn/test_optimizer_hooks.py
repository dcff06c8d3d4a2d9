"""Hooks on every optimizer of the process exist only while another optimizer trains `values`."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from helpers.packed_training import MASK, batch, loss_of, packed_setup, train
from helpers.small_models import ThreeLinears
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.nn import optimizer_hooks


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Returns a function that says how many hooks the process has; other tests add none."""
    torch_hooks = importlib.import_module("torch.optim.optimizer")  # torch.optim shows no attribute of this name
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    for name in names:
        monkeypatch.setattr(torch_hooks, name, OrderedDict())
    monkeypatch.setattr(optimizer_hooks, "_installed", [])
    monkeypatch.setattr(optimizer_hooks, "_followed", WeakTensorKeyDictionary())
    return lambda: tuple(len(getattr(torch_hooks, name)) for name in names)


def layers(model: nn.Module) -> list:
    return [model.a, model.b, model.c]


def packed() -> nn.Module:
    model = ThreeLinears()
    pack_gradients(model, freeze_rest=True, **MASK)
    return model


def assert_sgd_is_followed(model: nn.Module, loss=None) -> None:
    """A step of SGD reaches the weight of every layer, and no other entry."""
    before = [layer.weight.detach().clone() for layer in layers(model)]
    optimizer = torch.optim.SGD([layer.values for layer in layers(model)], lr=0.5)
    model.zero_grad()
    (loss_of(model, 0) if loss is None else loss).backward()
    optimizer.step()
    for layer, old in zip(layers(model), before):
        expected = old.view(-1)[layer.indices.long()] - 0.5 * layer.values.grad
        assert torch.equal(layer.values, expected) and layer.values.grad.abs().max() > 0
        old.view(-1)[layer.indices.long()] = expected
        assert torch.equal(layer.weight, old)


def test_lift_adamw_alone_never_meets_a_hook(installed):
    model, optimizer = packed_setup(refresh_interval=2)
    train(model, optimizer, range(5))
    assert installed() == (0, 0)
    assert not any(layer.values._post_accumulate_grad_hooks for layer in layers(model))


def test_an_unrelated_optimizer_never_meets_a_hook(installed, monkeypatch):
    def never(*args):
        raise AssertionError("a hook ran")

    monkeypatch.setattr(optimizer_hooks, "_before", never)
    monkeypatch.setattr(optimizer_hooks, "_after", never)
    model, optimizer = packed_setup()
    other = nn.Linear(24, 2)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    other(batch(0)).sum().backward()
    sgd.step()
    assert installed() == (0, 0)


def test_packing_installs_nothing_and_the_first_gradient_does(installed):
    model = packed()
    assert installed() == (0, 0)
    assert_sgd_is_followed(model)
    assert installed() == (1, 1)
    assert not any(layer.values._post_accumulate_grad_hooks for layer in layers(model))
    assert_sgd_is_followed(packed())
    assert installed() == (1, 1)


def test_hooks_go_when_every_value_is_claimed(installed):
    """A backward pass before the optimizer is made leaves nothing behind."""
    model, other = packed(), packed()
    loss_of(model, 0).backward()
    loss_of(other, 0).backward()
    optimizer_hooks.claim(layer.values for layer in layers(model))
    assert installed() == (1, 1)
    optimizer_hooks.claim(layer.values for layer in layers(other))
    assert installed() == (0, 0)


def test_other_models_are_followed_beside_lift_adamw(installed):
    model, optimizer = packed_setup()
    train(model, optimizer, range(2))
    other = packed()
    assert_sgd_is_followed(other)
    train(model, optimizer, range(2, 4))
    assert_sgd_is_followed(other)
    assert installed() == (1, 1)


def test_claiming_other_parameters_does_nothing(installed):
    model = packed()
    loss_of(model, 0).backward()
    others = model.a.weight, nn.Parameter(torch.zeros(3)), torch.zeros(2, 2)
    optimizer_hooks.claim(others)
    assert installed() == (1, 1) and not any(p in optimizer_hooks._watches for p in others)
    optimizer_hooks.claim([model.a.values])
    optimizer_hooks.watch(model.a.values)
    assert not model.a.values._post_accumulate_grad_hooks  # a claim outlives later calls of `watch`


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_followed(installed, name):
    """The original is claimed, the copy is not."""
    model, optimizer = packed_setup()
    train(model, optimizer, range(1))
    duplicate = COPIES[name](model)
    assert_sgd_is_followed(duplicate)
    assert installed() == (1, 1)


def test_values_that_were_frozen_when_copied(installed):
    model = packed()
    for layer in layers(model):
        layer.values.requires_grad_(False)
    duplicate = copy.deepcopy(model)
    for each in (duplicate, model):
        for layer in layers(each):
            assert not layer.values.requires_grad
            layer.values.requires_grad_(True)
        assert_sgd_is_followed(each)


def test_values_that_came_from_the_meta_device(installed):
    model = packed()
    state, lists = model.state_dict(), [layer.indices for layer in layers(model)]
    model.to("meta").to_empty(device="cpu")
    for layer, indices in zip(layers(model), lists):
        layer.indices.copy_(indices)
    model.load_state_dict(state)
    assert_sgd_is_followed(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(installed, reentrant):
    model = packed()
    x = batch(0).requires_grad_()
    loss = checkpoint(model, x, use_reentrant=reentrant).square().mean()
    assert_sgd_is_followed(model, loss)


def test_a_compiled_model(installed):
    """The hook changes nothing that a compiled model depends on: it compiles once."""
    model = packed()
    counter = importlib.import_module("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_sgd_is_followed(model, compiled(batch(0)).square().mean())
    model.zero_grad()
    compiled(batch(1)).square().mean().backward()
    assert counter.frame_count == 1


def test_gradients_by_hand_are_not_watched(installed):
    """The remedy is `scatter`."""
    model = packed()
    values = model.a.values
    values.grad = torch.autograd.grad(loss_of(model, 0), values)[0]
    torch.optim.SGD([values], lr=0.5).step()
    assert installed() == (0, 0)
    model.a.scatter()
    assert torch.equal(model.a.weight.view(-1)[model.a.indices.long()], values)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_a_model_and_its_optimizer_meet_no_hook(installed, copied):
    """Whichever of the two is copied first."""
    pair = packed_setup()
    train(*pair, range(2))
    train(*copied(pair), range(2, 4))
    optimizer, model = copied(pair[::-1])
    train(model, optimizer, range(2, 4))
    assert installed() == (0, 0)


def test_values_are_followed_again_when_their_lift_adamw_is_deleted(installed):
    model, optimizer = packed_setup()
    train(model, optimizer, range(2))
    del optimizer
    gc.collect()
    assert_sgd_is_followed(model)


def test_values_stay_claimed_by_a_second_lift_adamw(installed):
    model, optimizer = packed_setup()
    second = LiftAdamW([layer.values for layer in layers(model)], **MASK)
    del optimizer
    gc.collect()
    train(model, second, range(2))
    assert installed() == (0, 0)
