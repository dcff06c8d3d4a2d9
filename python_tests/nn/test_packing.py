"""pack_gradients and unpack: what they change, what they refuse, and that unpack undoes it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers.bits import FP32
from helpers.packed_layers import OPTIONS, assert_same_gradients, data, packed_and_plain
from helpers.small_models import TwoLinears
from torch import nn

from lift_kernels import LiftAdamW, LiftLinear, lift_param_groups, pack_gradients, unpack

BAD_LISTS = {
    "int64": (torch.tensor([0, 4]), TypeError, "layer.up: the index list must be int32, got torch.int64"),
    "unsorted": (torch.tensor([4, 0], dtype=torch.int32), ValueError, "layer.up: .*got 4 before 0 at position 0"),
    "twice": (torch.tensor([4, 4], dtype=torch.int32), ValueError, "layer.up: .*got 4 before 4"),
    "too large": (torch.tensor([0, 6], dtype=torch.int32), IndexError, "layer.up: index 6 is out of range for 6"),
    "negative": (torch.tensor([-1, 3], dtype=torch.int32), IndexError, "layer.up: index -1 is out of range"),
    "a matrix": (torch.tensor([[0, 3]], dtype=torch.int32), ValueError, "layer.up: .*one-dimensional"),
    "elsewhere": (torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "layer.up: the index list is on meta"),
}


@pytest.mark.parametrize("index, error, message", BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_index_lists_change_nothing(index, error, message):
    layer = nn.Linear(3, 2)
    before = dict(vars(layer))
    with pytest.raises(error, match=message):
        LiftLinear.pack(layer, index, "layer.up")
    assert type(layer) is nn.Linear and vars(layer) == before and layer.weight.requires_grad


def test_values_of_another_length():
    layer = nn.Linear(3, 2)
    index = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"up: values must be 2 float32 numbers, got \(3,\) torch.float32"):
        LiftLinear.pack(layer, index, "up", nn.Parameter(torch.zeros(3)))
    LiftLinear.pack(layer, index, "up")
    layer.values.data = torch.zeros(3)
    with pytest.raises(ValueError, match=r"values has shape \(3,\), its index list \(2,\)"):
        layer(torch.ones(1, 3))


def test_a_wrapped_forward_is_refused():
    """accelerate wraps it for offloading. The packed layer would never be called."""
    model = TwoLinears()
    model.down.forward = model.down.forward
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="down: its forward was replaced on the instance"):
        pack_gradients(model, **OPTIONS, freeze_rest=True)
    assert type(model.up) is nn.Linear and {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_pack_and_unpack_give_back_the_model():
    model = TwoLinears()
    names, forward_calls = list(model.state_dict()), []
    model.up.register_forward_hook(lambda *a: forward_calls.append(1))
    weight, start = model.up.weight, model.up.weight.detach().clone()
    model.down.bias.requires_grad_(False)
    groups = pack_gradients(model, **OPTIONS)
    assert isinstance(model.up, LiftLinear) and isinstance(model.up, nn.Linear) and model.up.weight is weight
    assert [name for name, _ in groups[0]["params"]] == ["up.values", "down.values"]
    assert groups[0]["params"][0][1] is model.up.values and groups[0]["density"] == 0.2
    assert lift_param_groups(model)[0]["params"] == groups[0]["params"]
    assert model.up.values.dtype == FP32 and torch.equal(model.up.values, weight.view(-1)[model.up.indices.long()])
    with pytest.raises(RuntimeError, match="packed gradients already"):
        pack_gradients(model, **OPTIONS)
    model(data(4, 12)).sum().backward()
    assert unpack(model) is model
    assert type(model.up) is nn.Linear and list(model.state_dict()) == names and model.up.weight is weight
    assert "values" not in dict(model.up.named_parameters()) and not hasattr(model.up, "indices")
    assert torch.equal(weight, start) and forward_calls == [1]
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"down.bias"}
    model(data(4, 12)).sum().backward()
    assert model.up.weight.grad is not None
    assert pack_gradients(model, **OPTIONS)


def test_masks_are_those_of_the_optimizer():
    for selection in ("principal", "off_principal", "random"):
        packed, plain = TwoLinears(), TwoLinears()
        pack_gradients(packed, **OPTIONS, selection=selection, seed=5)
        optimizer = LiftAdamW(lift_param_groups(plain), **OPTIONS, selection=selection, seed=5)
        optimizer.refresh()
        for name in ("up", "down"):
            assert torch.equal(
                packed.get_submodule(name).indices, optimizer.state[plain.get_submodule(name).weight]["indices"]
            )


def test_include_exclude_and_freezing():
    model = TwoLinears()
    groups = pack_gradients(model, exclude="down", freeze_rest=True, **OPTIONS)
    assert type(model.down) is nn.Linear and [name for name, _ in groups[0]["params"]] == ["up.values"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["up.values"]


def test_tied_weights_share_values():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    packed, plain = Tied(), Tied()
    groups = pack_gradients(packed, **OPTIONS)
    assert packed.a.values is packed.b.values and packed.a.weight is packed.b.weight
    assert [name for name, _ in groups[0]["params"]] == ["a.values"]
    packed(data(4, 8)).square().sum().backward()
    plain(data(4, 8)).square().sum().backward()
    expected = plain.a.weight.grad.view(-1)[packed.a.indices.long()]
    torch.testing.assert_close(packed.a.values.grad, expected, rtol=1e-6, atol=1e-6)
    optimizer = LiftAdamW(groups, lr=0.1)
    optimizer.step()
    optimizer.refresh(drop_gradients=True)
    assert packed.a.indices is packed.b.indices
    copied = copy.deepcopy(packed)
    assert copied.a.values is copied.b.values
    unpack(packed)
    assert type(packed.a) is type(packed.b) is nn.Linear and packed.a.weight.requires_grad


def test_a_subclass_of_linear_keeps_its_forward():
    """nn.MultiheadAttention uses the weight of its out_proj without calling the layer.

    So a hook packs that gradient.
    """
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    plain = copy.deepcopy(model)
    groups = pack_gradients(model, **OPTIONS)
    assert [name for name, _ in groups[0]["params"]] == ["out_proj.weight"]
    x = data(2, 5, 8)
    model(x, x, x)[0].square().sum().backward()
    plain(x, x, x)[0].square().sum().backward()
    weight = model.out_proj.weight
    assert weight.grad is None
    assert torch.equal(weight.lift_grad, plain.out_proj.weight.grad.view(-1)[weight.lift_indices.long()])


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(10, 6), nn.Tanh(), Conv1D(4, 10))
    plain = copy.deepcopy(model)
    pack_gradients(model, **OPTIONS)
    model(data(3, 5, 6)).square().sum().backward()
    plain(data(3, 5, 6)).square().sum().backward()
    assert_same_gradients(model, plain, exact=False)
    assert type(unpack(model)[0]) is Conv1D


def test_a_weight_changed_behind_the_back_is_reported_by_unpack(caplog):
    packed, _ = packed_and_plain()
    with torch.no_grad():
        packed.up.weight.mul_(2)
        packed.down.weight.mul_(2)
    with caplog.at_level(logging.WARNING, logger="lift_kernels"):
        unpack(packed)
    assert [r.getMessage() for r in caplog.records] == [
        "up and 1 more weights were changed outside the optimizer; the plain layers keep the new weights"
    ]


@pytest.mark.parametrize("freeze_rest", [False, True])
def test_unpack_gives_a_frozen_weight_its_flag_back(freeze_rest):
    _, plain = packed_and_plain()
    plain.up.weight.requires_grad_(False)
    groups = pack_gradients(plain, freeze_rest=freeze_rest)
    assert all(values.requires_grad for _, values in groups[0]["params"])
    assert not unpack(plain).up.weight.requires_grad and plain.down.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": "("}, ValueError, r"include='\(' is no regular expression: missing \)"),
        ({"exclude": 3}, TypeError, "exclude must be a regular expression as a string or None, got 3"),
        ({"extra": "[a"}, ValueError, r"extra='\[a' is no regular expression"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend 'cuda' computes no packed weight gradients; choose one of native-cpu",
        ),
        ({"backend": "native-cuda"}, ValueError, "backend 'native-cuda' computes no packed weight gradients"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"selection": "best"}, ValueError, "selection must be one of principal, .* got 'best'"),
        ({"rank": True}, ValueError, r"up\.weight: rank must be an integer of at least 1 or None, got True"),
        ({"density": "0.1"}, ValueError, r"up\.weight: density must be in \(0, 1\], got '0.1'"),
        ({"budget_rank": 0}, ValueError, r"up\.weight: budget_rank must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_cannot_work(options, error, message):
    packed, plain = packed_and_plain()
    with pytest.raises(error, match=message):
        pack_gradients(plain, **options, freeze_rest=True)
    assert not isinstance(plain.up, LiftLinear) and all(p.requires_grad for p in plain.parameters())


def test_fully_shard_is_refused_with_a_remedy(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    packed, plain = packed_and_plain()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        with pytest.raises(RuntimeError, match="up: fully_shard cuts values.*replicas"):
            fully_shard(packed, mesh=mesh)
        with pytest.raises(TypeError, match=r"up\.weight: the weight is a DTensor, .*replicas \(DDP\) are"):
            LiftAdamW(lift_param_groups(fully_shard(plain, mesh=mesh)))
    finally:
        distributed.destroy_process_group()
