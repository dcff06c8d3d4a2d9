"""Training with packed gradients: the same weights as with dense ones, and everything an optimizer
is asked on the way.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from helpers.optimizers import assert_same, snapshot
from helpers.step_problems import BF16, FP16, FP32, bits
from torch import nn
from torch.nn import functional as F

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients, unpack
from lift_kernels.nn.linear import PackedLinear

MASK = {"rank": 4, "density": 0.1}
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Net(nn.Module):
    def __init__(self, dtype=FP32):
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 33), nn.Linear(33, 17, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.c(F.silu(self.b(F.silu(self.a(x)))))


def batch(step, dtype=FP32, rows=12):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(50 + step)).to(dtype)


def loss_of(model, step, rows=12):
    return model(batch(step, next(model.parameters()).dtype, rows)).float().square().mean()


def packed_setup(backend="reference", dtype=FP32, model=None, mask=None, **options):
    model = model or Net(dtype)
    groups = pack_gradients(model, backend=backend, freeze_rest=True, **(mask or MASK))
    return model, LiftAdamW(groups, backend=backend, **ADAMW | options)


def dense_setup(backend="reference", dtype=FP32, model=None, mask=None, **options):
    model = model or Net(dtype)
    groups = lift_param_groups(model, freeze_rest=True)
    return model, LiftAdamW(groups, backend=backend, **ADAMW | (mask or MASK) | options)


def train(model, optimizer, steps, micro=1, scaler=None):
    for step in steps:
        for part in range(micro):
            loss = loss_of(model, 10 * step + part) / micro
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def weights(model):
    return {name: bits(value).clone() for name, value in model.state_dict().items()}


CASES = {
    "plain": ({}, 1),
    "4 micro-batches": ({}, 4),
    "clipped": ({"max_grad_norm": 0.01}, 1),
    "refreshed": ({"refresh_interval": 3}, 1),
    "per entry": ({"bias_correction": "per_entry", "refresh_interval": 3}, 1),
}


@pytest.mark.parametrize("options, micro", CASES.values(), ids=CASES)
def test_packed_gradients_train_the_same_weights(options, micro):
    """Bit for bit on the reference path in fp32; the native one within the error that sums in
    another order have.
    """
    options = {"refresh_interval": None} | options
    for backend in ("reference", "native-cpu"):
        packed, plain = packed_setup(backend, **options), dense_setup(backend, **options)
        train(*packed, range(8), micro)
        train(*plain, range(8), micro)
        mine, theirs = packed[0].state_dict(), plain[0].state_dict()
        assert list(mine) == list(theirs)
        for name in mine:
            if backend == "reference":
                assert torch.equal(bits(mine[name]), bits(theirs[name])), name
            else:
                torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)
        start = Net().state_dict()
        assert not torch.equal(mine["a.weight"], start["a.weight"]) and torch.equal(mine["a.bias"], start["a.bias"])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_weights_are_their_rounded_values(dtype):
    """The values are the fp32 master, and a dense run from the same gradients has the same one."""
    model, optimizer = packed_setup("native-cpu", dtype)
    twin, dense = dense_setup("native-cpu", dtype)
    train(model, optimizer, range(6))
    train(twin, dense, range(6))
    for name in "abc":
        layer, theirs = getattr(model, name), getattr(twin, name).weight
        assert torch.equal(layer.weight.view(-1)[layer.indices.long()], layer.values.to(dtype))
        assert torch.equal(bits(layer.weight.detach()), bits(theirs.detach()))
        assert torch.equal(layer.values.detach(), dense.state[theirs]["master"])


def test_values_are_the_optimizers_own_slice():
    """No second copy, before and after a refresh; 16 bytes of state an entry, values included."""
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
    """They are the weight's at the new list; entries that leave keep the weight they have; the next
    gradient fits.
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
    wanted = r"a\.values has a packed gradient.*zero_grad\(\) first, or refresh\(drop_gradients=True\)"
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
    """The values follow, once said with the layer's name, so that a stale one undoes nothing."""
    model, optimizer = packed_setup("native-cpu", dtype, refresh_interval=None)
    train(model, optimizer, range(2))
    changed = torch.full_like(model.b.weight, 0.25)
    with torch.no_grad():
        model.b.weight.copy_(changed)
    optimizer.param_groups[0]["lr"] = 0.0
    with caplog.at_level(logging.WARNING, logger="lift_kernels"):
        train(model, optimizer, range(2, 4))
    assert torch.equal(model.b.weight, changed) and model.b.values.eq(0.25).all()
    assert [r.getMessage().split(" was changed")[0] for r in caplog.records] == ["b.values"]


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


def interrupted(model, optimizer, way):
    if way == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if way == "deepcopy, optimizer first":
        return copy.deepcopy((optimizer, model))[::-1]
    if way == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = Net(next(model.parameters()).dtype)
    make = dense_setup if way == "into matrix mode" else packed_setup
    fresh, new = make(optimizer.backend, model=fresh, mask={"rank": 1, "density": 0.03}, lr=1.0)
    fresh.load_state_dict(saved["model"])
    new.load_state_dict(saved["optimizer"])
    return fresh, new


@pytest.mark.parametrize("way", ["deepcopy", "deepcopy, optimizer first", "pickle", "state_dict", "into matrix mode"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_interrupted_training_goes_on_with_the_same_bits(way, dtype):
    whole, interruptible = packed_setup(dtype=dtype, refresh_interval=3), packed_setup(dtype=dtype, refresh_interval=3)
    train(*whole, range(8))
    train(*interruptible, range(4))
    model, optimizer = interrupted(*interruptible, way)
    train(*interruptible, range(4, 5))  # the original is another one
    train(model, optimizer, range(4, 8))
    expected = weights(whole[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(model).items())


def test_clip_grad_norm_clips_by_the_norm_over_trained_entries():
    packed, plain = packed_setup(), dense_setup(max_grad_norm=0.01)
    for step in range(3):
        for model, optimizer in (packed, plain):
            optimizer.zero_grad()
            loss_of(model, step).backward()
        norm = nn.utils.clip_grad_norm_(packed[0].parameters(), 0.01)
        packed[1].step()
        plain[1].step()
        torch.testing.assert_close(norm, plain[1].grad_norm, rtol=1e-6, atol=0)
    for mine, theirs in zip(packed[0].state_dict().values(), plain[0].state_dict().values()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_grad_scaler():
    """A power of two changes no bit; an infinite gradient skips the step and backs the scale
    off.
    """
    scaled, plain = packed_setup(), packed_setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    train(*scaled, range(3), scaler=scaler)
    train(*plain, range(3))
    expected = weights(plain[0])
    assert all(torch.equal(value, expected[name]) for name, value in weights(scaled[0]).items())
    scaler.scale(loss_of(scaled[0], 3)).backward()
    scaled[0].a.values.grad[2] = float("inf")
    scaler.step(scaled[1])
    scaler.update()
    assert all(torch.equal(value, expected[name]) for name, value in weights(scaled[0]).items())
    assert scaler.get_scale() == 2.0**11


def test_options_that_cannot_work_name_the_layer():
    model = Net(BF16)
    groups = pack_gradients(model, **MASK)
    with pytest.raises(ValueError, match=r"a\.values: .*master=None cannot work"):
        LiftAdamW(groups, master=None)
    with pytest.raises(ValueError, match=r"a\.values has packed gradients, which lift=False cannot train"):
        LiftAdamW([groups[0] | {"lift": False}])
    optimizer = LiftAdamW([model.a.values, model.b.values])  # a list of parameters will do
    assert [name for _, _, name in optimizer._sparse_parameters()] == ["a", "b"]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_another_optimizer_trains_the_values_until_a_refresh(dtype, caplog):
    """The weight follows, and values follow a changed weight; LiftAdamW will not exchange entries
    under it.
    """
    model = Net(dtype)
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


class Experts(nn.Module):
    """Stacked expert weights, used by a batched product, between two linear layers."""

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
        # The norms of two launches are put together, which rounds once more.
        exact = options.get("max_grad_norm") is None
        torch.testing.assert_close(value, plain[0].state_dict()[name], rtol=0, atol=0 if exact else 1e-7)
    assert not torch.equal(packed[0].experts, Experts().experts)


def test_packed_gradients_of_a_hook_are_cleared():
    """By zero_grad, and by a step, since model.zero_grad() does not know them."""
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
    """GradScaler sees no infinity in lift_grad; and it cannot unscale it."""
    model, optimizer = hooked_setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train(model, optimizer, range(2), scaler=scaler)
    twin, plain = hooked_setup()
    train(twin, plain, range(2))
    expected = weights(twin)
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
    with pytest.raises(ValueError, match="extra='nothing' matches no further parameter of Experts"):
        pack_gradients(Experts(), extra="nothing", **MASK)


def test_no_dense_gradient_is_kept():
    """After backward the only gradients are k fp32 values a matrix."""
    model, _ = packed_setup("native-cpu")
    loss_of(model, 0).backward()
    held = {name: p.grad.numel() for name, p in model.named_parameters() if p.grad is not None}
    assert held == {f"{n}.values": m.indices.numel() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
