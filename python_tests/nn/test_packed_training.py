"""Training with packed gradients gives the same weights as with dense ones."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, bits
from helpers.packed_training import MASK, dense_setup, loss_of, packed_setup, train, weights
from helpers.small_models import ThreeLinears
from torch import nn

from lift_kernels import LiftAdamW, pack_gradients
from lift_kernels.nn.linear import PackedLinear
from lift_kernels.optim.matrix_ref import names_of

CASES = {
    "plain": ({}, 1),
    "4 micro-batches": ({}, 4),
    "clipped": ({"max_grad_norm": 0.01}, 1),
    "refreshed": ({"refresh_interval": 3}, 1),
    "per entry": ({"bias_correction": "per_entry", "refresh_interval": 3}, 1),
}


@pytest.mark.parametrize("options, micro", CASES.values(), ids=CASES)
def test_packed_gradients_train_the_same_weights(options, micro):
    """They are equal to the bit on the reference backend in fp32.

    The native backend sums in another order and agrees up to rounding.
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
        start = ThreeLinears().state_dict()
        assert not torch.equal(mine["a.weight"], start["a.weight"]) and torch.equal(mine["a.bias"], start["a.bias"])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_low_precision_weights_are_their_rounded_values(dtype):
    """The values are the fp32 master; a dense run with the same gradients has the same one."""
    model, optimizer = packed_setup("native-cpu", dtype)
    dense_model, dense = dense_setup("native-cpu", dtype)
    train(model, optimizer, range(6))
    train(dense_model, dense, range(6))
    for name in "abc":
        layer, theirs = getattr(model, name), getattr(dense_model, name).weight
        assert torch.equal(layer.weight.view(-1)[layer.indices.long()], layer.values.to(dtype))
        assert torch.equal(bits(layer.weight.detach()), bits(theirs.detach()))
        assert torch.equal(layer.values.detach(), dense.state[theirs]["master"])


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
    fresh = ThreeLinears(next(model.parameters()).dtype)
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
    train(*interruptible, range(4, 5))  # the original is independent
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
    """A power of two changes no bit.

    An infinite gradient skips the step and lowers the scale.
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
    model = ThreeLinears(BF16)
    groups = pack_gradients(model, **MASK)
    with pytest.raises(ValueError, match=r"a\.values: .*master=None cannot work"):
        LiftAdamW(groups, master=None)
    with pytest.raises(ValueError, match=r"a\.values has packed gradients, which lift=False cannot train"):
        LiftAdamW([groups[0] | {"lift": False}])
    optimizer = LiftAdamW([model.a.values, model.b.values])  # a list of parameters is enough
    assert names_of(optimizer.param_groups[0], 0) == ["a", "b"]


def test_no_dense_gradient_is_kept():
    """After backward the only gradients are k fp32 values a matrix."""
    model, _ = packed_setup("native-cpu")
    loss_of(model, 0).backward()
    held = {name: p.grad.numel() for name, p in model.named_parameters() if p.grad is not None}
    assert held == {f"{n}.values": m.indices.numel() for n, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("how", ["dict", "register"])
def test_a_weight_that_was_replaced_without_setattr_is_trained(how):
    """Tools write to ``_parameters`` or call ``register_parameter``."""
    model, optimizer = packed_setup()
    train(model, optimizer, range(1))
    weight = torch.nn.Parameter(model.a.weight.detach().clone(), requires_grad=False)
    if how == "dict":
        model.a._parameters["weight"] = weight
    else:
        del model.a.weight
        model.a.register_parameter("weight", weight)
    before = weight.detach().clone()
    train(model, optimizer, range(1, 2))
    assert torch.equal((weight != before).view(-1).nonzero().view(-1).int(), model.a.indices)


@pytest.mark.parametrize("replaced", ["values", "indices"])
def test_a_refresh_binds_what_was_replaced_by_a_copy(replaced):
    model, optimizer = packed_setup(refresh_interval=None)
    train(model, optimizer, range(1))
    if replaced == "values":
        model.a.values.data = model.a.values.data.clone()
    else:
        model.a.indices = model.a.indices.clone()
    with torch.no_grad():
        model.a.weight.copy_(model.a.weight.flip(0))
    optimizer.refresh()
    entry = optimizer.state[model.a.values]
    assert model.a.values.data_ptr() == entry["master"].data_ptr()
    assert model.a.indices.data_ptr() == entry["indices"].data_ptr()
