"""GradScaler with gradients that hooks pack, which it cannot see."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.bits import FP16, FP32, bits
from helpers.optimizers import OPTIONS
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients, unpack

ALL_PACKED = (
    r"stack: GradScaler looks for infinities in p\.grad alone, and hooks have packed every gradient .* bf16 without a "
    r"scaler, or unpack\(model\) .* or let the optimizer train some linear layer"
)
MASK = {"rank": 4, "density": 0.2}


class Stack(nn.Module):
    """A 3-D batch of matrices, and a norm."""

    def __init__(self, dtype=FP32):
        super().__init__()
        torch.manual_seed(4)
        self.stack = nn.Parameter(torch.randn(3, 24, 10))
        self.norm = nn.LayerNorm(10)
        self.to(dtype)

    def forward(self, x):
        return self.norm(torch.einsum("ti,eio->to", x.to(self.stack.dtype), self.stack)).float().square().mean()


class Linear(nn.Module):
    """One linear layer, which another module holds too, so its gradient is packed by a hook."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.stack = nn.Bilinear(5, 6, 4, bias=False).weight

    def forward(self, x):
        return torch.einsum("ti,oij,tj->to", x[:, :5], self.stack, x[:, 5:11]).square().mean()


def batch(step):
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(step))


def hooked(model, *, dense=()):
    """An optimizer of the hooked stack, and of parameters named ``dense``."""
    groups = [{"params": [("stack", model.stack)], "lift": True}]
    model.requires_grad_(False)
    holder = nn.Module()
    holder.head = nn.Linear(4, 4)  # pack_gradients needs a linear layer; this one stays out of the optimizer
    holder.inner = model
    packed = pack_gradients(holder, extra="stack", **MASK)[0]["params"]
    groups[0]["params"] = [("stack", p) for name, p in packed if name.endswith("stack")]
    others = [(name, p.requires_grad_()) for name, p in model.named_parameters() if name in dense]
    if others:
        groups.append({"params": others, "lift": False})
    return LiftAdamW(groups, **OPTIONS | MASK, refresh_interval=None)


def state(model):
    return {name: bits(value).clone() for name, value in model.state_dict().items()}


def refused(model, optimizer, step, scaler, message=ALL_PACKED):
    """Check that ``step`` raises, and that no weight, mask or moment is there."""
    before = state(model)
    scaler.scale(model(batch(0))).backward()
    with pytest.raises(RuntimeError, match=message):
        step()
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert all(
        entry["step"] == 0 for entry in optimizer.state.values() if entry
    )  # accelerate asks for the state at once
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("make", [Stack, Linear, lambda: Stack(FP16)])
def test_a_scaler_is_refused_where_hooks_pack_every_gradient(make):
    """Before the step: scaler.update() would fail after it."""
    model = make()
    optimizer, scaler = hooked(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    refused(model, optimizer, lambda: scaler.step(optimizer), scaler)
    optimizer.step()  # without the scaler it works, by a gradient of four times the size
    assert optimizer.state[model.stack]["step"] == 1


def test_so_it_is_after_unscale():
    model = Stack()
    optimizer, scaler = hooked(model), torch.amp.GradScaler("cpu", init_scale=4.0)

    def step():
        scaler.unscale_(optimizer)
        scaler.step(optimizer)

    refused(model, optimizer, step, scaler)


def test_so_it_is_in_accelerates_wrapper():
    model = Stack()
    optimizer, scaler = hooked(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    Accelerator(cpu=True)  # Its wrapper needs one.
    refused(model, optimizer, AcceleratedOptimizer(optimizer, scaler=scaler).step, scaler)


def test_so_it_is_beside_another_optimizer_of_the_scaler():
    """Its update would pass, and would not know of infinities in packed gradients."""
    model = Stack()
    optimizer, scaler = hooked(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    norm = torch.optim.SGD(model.norm.requires_grad_().parameters(), lr=0.0)

    def step():
        scaler.step(norm)
        scaler.step(optimizer)

    refused(model, optimizer, step, scaler)


def test_unscale_is_refused_beside_a_dense_gradient():
    model = Stack()
    optimizer, scaler = hooked(model, dense=["norm.weight"]), torch.amp.GradScaler("cpu", init_scale=4.0)

    def step():
        scaler.unscale_(optimizer)
        scaler.step(optimizer)

    refused(
        model, optimizer, step, scaler, r"stack: scaler\.unscale_ does not reach packed gradients .* max_grad_norm="
    )


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_one_dense_gradient_makes_a_scaler_work(dtype):
    """The third remedy: weights are those of training without a scaler, and an infinity skips."""
    model, plain = Stack(dtype), Stack(dtype)
    optimizer, other = (hooked(m, dense=["norm.weight", "norm.bias"]) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        scaler.scale(model(batch(step))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        plain(batch(step)).backward()
        other.step()
        other.zero_grad()
    expected = state(plain)
    if dtype == FP32:  # fp16 gradients have other bits at another scale
        assert all(torch.equal(value, expected[name]) for name, value in state(model).items())
    before = state(model)
    scaler.scale(model(batch(3))).backward()
    model.stack.lift_grad[7] = float("inf")
    scaler.step(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert not torch.equal(before["stack"], state(Stack(dtype))["stack"])


def test_the_second_remedy_works():
    model = Stack()
    hooked(model)
    unpack(model)
    optimizer = LiftAdamW([{"params": [("stack", model.stack)], "lift": True}], **OPTIONS | MASK)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(batch(0))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[model.stack]["step"] == 1 and scaler.get_scale() == 4.0


def test_a_step_without_any_gradient_passes_a_scaler_on_to_torchs_error():
    """found_inf is the number 0 then, and the step changes nothing."""
    model = Stack()
    optimizer, scaler = hooked(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    scaler.step(optimizer)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()
    assert all(torch.equal(value, state(Stack())[name]) for name, value in state(model).items())


def test_a_disabled_scaler_is_none():
    model = Stack()
    optimizer, scaler = hooked(model), torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(batch(0))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[model.stack]["step"] == 1
