"""Gradient hooks, which pack the gradients of parameters outside linear layers."""

from __future__ import annotations

import pickle

import pytest
import torch
from helpers.bits import FP32
from helpers.optimizers import assert_same, snapshot
from helpers.packed_training import ADAMW, MASK, loss_of, train, weights
from torch import nn
from torch.nn import functional as F

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients, unpack


class Experts(nn.Module):
    """Stacked expert weights between two linear layers, used by a batched product."""

    def __init__(self, dtype=FP32):
        super().__init__()
        torch.manual_seed(9)
        self.a = nn.Linear(24, 16, bias=False)
        self.experts = nn.Parameter(0.2 * torch.randn(3, 16, 20))
        self.c = nn.Linear(20, 8, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.c(torch.einsum("tn,enm->etm", F.silu(self.a(x)), self.experts).sum(0))


def hooked_setup(**options):
    model = Experts()
    groups = pack_gradients(model, extra="experts", freeze_rest=True, backend="reference", **MASK)
    return model, LiftAdamW(groups, backend="reference", **ADAMW | options)


def dense_experts(**options):
    model = Experts()
    groups = lift_param_groups(model, freeze_rest=True)
    groups[0]["params"].append(("experts", model.experts.requires_grad_()))
    return model, LiftAdamW(groups, backend="reference", **ADAMW | MASK | options)


def test_a_hook_packs_the_gradient_of_stacked_experts():
    model, _ = hooked_setup()
    plain = Experts()
    for step in range(2):
        loss_of(model, step).backward()
        loss_of(plain, step).backward()
    experts = model.experts
    assert experts.grad is None and experts.lift_grad.dtype == FP32
    assert torch.equal(experts.lift_grad, plain.experts.grad.view(-1)[experts.lift_indices.long()])
    per_matrix = (experts.lift_indices // (16 * 20)).bincount()
    assert per_matrix.tolist() == [32, 32, 32], "each expert has a mask of its own"
    unpack(model)
    model.zero_grad()
    loss_of(model, 0).backward()
    assert experts.grad is not None and experts.lift_grad is None


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01}, {"refresh_interval": 3}], ids=str)
@pytest.mark.parametrize("micro", [1, 4])
def test_hooked_parameters_train_as_dense_ones(options, micro):
    options = {"refresh_interval": None} | options
    packed, plain = hooked_setup(**options), dense_experts(**options)
    train(*packed, range(7), micro)
    train(*plain, range(7), micro)
    for name, value in packed[0].state_dict().items():
        # The norms of two launches are combined, which rounds once more.
        exact = options.get("max_grad_norm") is None
        torch.testing.assert_close(value, plain[0].state_dict()[name], rtol=0, atol=0 if exact else 1e-7)
    assert not torch.equal(packed[0].experts, Experts().experts)


def test_packed_gradients_of_a_hook_are_cleared():
    """zero_grad and a step clear them, because model.zero_grad() does not know them."""
    model, optimizer = hooked_setup()
    loss_of(model, 0).backward()
    optimizer.zero_grad()
    assert model.experts.lift_grad is None
    loss_of(model, 0).backward()
    optimizer.step()
    model.zero_grad()
    assert model.experts.lift_grad is None
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="has a packed gradient"):
        optimizer.refresh()


def test_the_optimizer_checks_packed_gradients_of_a_hook_itself():
    """GradScaler sees no infinity in lift_grad and cannot unscale it."""
    model, optimizer = hooked_setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(model, optimizer, range(2), scaler=scaler)
    unscaled, plain = hooked_setup()
    train(unscaled, plain, range(2))
    expected = weights(unscaled)
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    scaler.scale(loss_of(model, 2)).backward()
    model.experts.lift_grad[5] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 2)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ does not reach packed gradients"):
        scaler.step(optimizer)


def test_a_damaged_packed_gradient_changes_nothing():
    model, optimizer = hooked_setup()
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    before = snapshot(optimizer)
    good = model.experts.lift_grad
    for bad in (good[:-1], good.double()):
        model.experts.lift_grad = bad
        with pytest.raises(ValueError, match="experts: lift_grad must be 96 float32 numbers"):
            optimizer.step()
    model.experts.lift_grad, model.experts.grad = good, torch.zeros_like(model.experts)
    with pytest.raises(RuntimeError, match="experts has a packed lift_grad and a dense grad"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_extra_must_match_something():
    with pytest.raises(ValueError, match="extra='nothing' matches no further matrix of Experts; .* are experts"):
        pack_gradients(Experts(), extra="nothing", **MASK)


def test_a_pickle_between_backward_and_step_keeps_the_packed_gradient():
    model, optimizer = hooked_setup()
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    copied, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert torch.equal(copied.experts.lift_grad, model.experts.lift_grad)
    other.step()
    optimizer.step()
    assert torch.equal(copied.experts, model.experts)
