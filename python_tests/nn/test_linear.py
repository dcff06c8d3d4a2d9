"""LiftLinear: the gradients of a plain layer, in every way that a plain layer is used, and an
ordinary model's state dict.
"""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from helpers.step_problems import BF16, FP16, FP32, bits, random_indices
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lift_kernels import LiftAdamW, LiftLinear, lift_linear, lift_param_groups, pack_gradients, unpack
from lift_kernels.nn.linear import PackedLinear

OPTIONS = {"rank": 3, "density": 0.2}


class Net(nn.Module):
    """Two linear layers and a norm; the first feeds the second."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.norm, self.down = nn.Linear(12, 20, bias), nn.LayerNorm(20), nn.Linear(20, 7, bias)

    def forward(self, x):
        return self.down(F.silu(self.norm(self.up(x))))


def packed_and_plain(**options):
    """The same model twice, the first with packed gradients."""
    plain = Net(**options)
    packed = copy.deepcopy(plain)
    pack_gradients(packed, **OPTIONS)
    return packed, plain


def data(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def assert_same_gradients(packed, plain, exact=True):
    """Every gradient of the plain model, packed where the layer is."""
    for layer, other in zip(packed.modules(), plain.modules()):
        if isinstance(layer, PackedLinear):
            assert layer.weight.grad is None
            expected = other.weight.grad.reshape(-1)[layer.indices.long()].float()
            torch.testing.assert_close(
                layer.values.grad, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6
            )
            pairs = [(layer.bias, other.bias)]
        else:
            pairs = list(zip(layer.parameters(recurse=False), other.parameters(recurse=False)))
        for mine, theirs in pairs:
            if theirs is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_gradcheck_in_float64(transposed):
    """Over x and bias, and over values through a wrapper that puts them into a copy of the
    weight.
    """
    weight = data(6, 5, seed=1).double()
    index = random_indices(30, 9, torch.Generator().manual_seed(2))
    x = data(2, 3, 6 if transposed else 5, seed=3).double().requires_grad_()
    bias = data(5 if transposed else 6, seed=4).double().requires_grad_()
    values = data(9, seed=5).double().requires_grad_()

    def scattered(x, values, bias):
        copied = weight.clone()
        copied.view(-1)[index.long()] = values.detach()
        return lift_linear(x, values, copied, index, bias, transposed=transposed, backend="reference")

    assert torch.autograd.gradcheck(scattered, (x, values, bias))


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (2, 1, 2, 3, 12), (0, 12), (2, 0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_of_any_rank(shape, bias):
    packed, plain = packed_and_plain(bias=bias)
    x, y = data(*shape).requires_grad_(), data(*shape).requires_grad_()
    packed(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
    assert_same_gradients(packed, plain)


def test_only_what_needs_a_gradient_gets_one():
    packed, _ = packed_and_plain()
    layer = packed.up
    x = data(4, 12)
    layer(x).sum().backward()  # an input that needs none
    assert layer.values.grad is not None and x.grad is None
    layer.bias.requires_grad_(False)
    layer.zero_grad()
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.bias.grad is None and layer.values.grad is not None and x.grad is not None
    layer.values.requires_grad_(False)
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.values.grad is None
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_backward_saves_only_what_it_reads():
    """An input is kept for the weight gradient alone: a layer without trained values keeps none, as
    a frozen layer.
    """
    packed, _ = packed_and_plain(bias=False)
    layer, saved = packed.up, []
    x = data(4, 12).requires_grad_()

    def save(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    for trained in (True, False):
        layer.values.requires_grad_(trained)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            layer(x)
        assert (x.data_ptr() in saved) == trained and layer.weight.data_ptr() in saved


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_micro_batches_accumulate_in_fp32(dtype):
    """Many small gradients on a large one: a sum in the weight's dtype would lose them."""
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)
    LiftLinear.pack(layer, torch.tensor([0, 4], dtype=torch.int32))
    for size in [256.0] + [0.25] * 64:
        layer(torch.full((1, 3), size, dtype=dtype)).sum().backward()
    assert layer.values.grad.dtype == FP32 and layer.values.grad.tolist() == [272.0, 272.0]


def test_autocast_gives_the_gradients_of_a_plain_model():
    packed, plain = packed_and_plain()
    x, y = data(5, 12).requires_grad_(), data(5, 12).requires_grad_()
    with torch.autocast("cpu", BF16):
        out, expected = packed(x), plain(y)
    assert out.dtype == BF16 and torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert_same_gradients(packed, plain)


def test_mixed_dtypes_are_refused_as_by_a_plain_layer():
    packed, _ = packed_and_plain()
    with pytest.raises(RuntimeError, match="dtype"):
        packed.up(data(4, 12, dtype=BF16))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    packed, plain = packed_and_plain()
    x, y = data(5, 12).requires_grad_(), data(5, 12).requires_grad_()
    checkpoint(packed, x, use_reentrant=reentrant).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert_same_gradients(packed, plain)


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_graph_break(autocast):
    packed, plain = packed_and_plain()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for step in range(2):  # a new index list of the same length does not compile again
        packed.zero_grad()
        plain.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            out, expected = compiled(data(5, 12, seed=step)), plain(data(5, 12, seed=step))
        out.float().square().sum().backward()
        expected.float().square().sum().backward()
        assert_same_gradients(packed, plain, exact=False)
        packed.up.indices = packed.up.indices.roll(1).sort().values.clone()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compile_by_inductor():
    packed, plain = packed_and_plain()
    torch._dynamo.reset()
    x = data(5, 12)
    torch.compile(packed, fullgraph=True)(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert_same_gradients(packed, plain, exact=False)


def test_what_cannot_work_says_so():
    packed, _ = packed_and_plain()
    x = data(5, 12).requires_grad_()
    wanted = "cannot be differentiated again or transformed.*unpack"
    with pytest.raises(RuntimeError, match=wanted):
        torch.autograd.grad(packed(x).sum(), x, create_graph=True)
    for transform in (
        lambda: torch.func.grad(lambda x: packed.up(x).sum())(x.detach()),
        lambda: torch.func.vmap(packed.up)(x.detach()),
        lambda: torch.func.jvp(packed.up, (x.detach(),), (x.detach(),)),
    ):
        with pytest.raises(RuntimeError, match=wanted):
            transform()
    unpack(packed)
    torch.autograd.grad(packed(x).sum(), x, create_graph=True)


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
    """As accelerate does for offloading: the packed layer would never be called."""
    model = Net()
    model.down.forward = model.down.forward
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="down: its forward was replaced on the instance"):
        pack_gradients(model, **OPTIONS, freeze_rest=True)
    assert type(model.up) is nn.Linear and {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_pack_and_unpack_give_back_the_model():
    model = Net()
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
    for selection in ("principal", "random"):
        packed, plain = Net(), Net()
        pack_gradients(packed, **OPTIONS, selection=selection, seed=5)
        optimizer = LiftAdamW(lift_param_groups(plain), **OPTIONS, selection=selection, seed=5)
        optimizer.refresh()
        for name in ("up", "down"):
            assert torch.equal(
                packed.get_submodule(name).indices, optimizer.state[plain.get_submodule(name).weight]["indices"]
            )


def test_include_exclude_and_freezing():
    model = Net()
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
    """nn.MultiheadAttention uses the weight of its out_proj without calling the layer: a hook packs
    that gradient.
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


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_stay_fp32_through_conversions(dtype):
    """To the bit; the index list and the gradient too. The weight is converted."""
    model = Net()
    pack_gradients(model, **OPTIONS)
    model(data(4, 12)).sum().backward()
    before = {
        n: (m.values.detach().clone(), m.values.grad.clone(), m.indices)
        for n, m in model.named_modules()
        if isinstance(m, PackedLinear)
    }
    for convert in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.type(dtype), lambda m: m.float()):
        convert(model)
        for name, (values, grad, index) in before.items():
            layer = model.get_submodule(name)
            assert torch.equal(bits(layer.values.detach()), bits(values)) and torch.equal(layer.indices, index)
            assert torch.equal(layer.values.grad, grad) and layer.indices.dtype == torch.int32
    assert model.up.weight.dtype == FP32
    meta = copy.deepcopy(model).to("meta")
    assert meta.up.values.is_meta and meta.up.indices.is_meta and meta.up.values.dtype == FP32


def test_state_dict_is_that_of_the_plain_model():
    packed, plain = packed_and_plain()
    assert list(packed.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)
    other = Net()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    for assign in (False, True):
        packed.load_state_dict(other.state_dict(), strict=True, assign=assign)
        for layer, theirs in ((packed.up, other.up), (packed.down, other.down)):
            assert torch.equal(layer.weight, theirs.weight) and not layer.weight.requires_grad
            assert torch.equal(layer.values, theirs.weight.view(-1)[layer.indices.long()])
    with pytest.raises(RuntimeError, match="Missing key.*up.weight"):
        packed.load_state_dict({k: v for k, v in other.state_dict().items() if k != "up.weight"})


def test_loading_the_present_weights_keeps_every_bit_of_the_values():
    """bf16 weights: what rounds to the loaded value is more exact than it."""
    packed, _ = packed_and_plain()
    values = packed.up.values.detach().clone()
    packed.to(BF16)
    packed.load_state_dict({k: v.clone() for k, v in packed.state_dict().items()})
    assert torch.equal(packed.up.values, values)


def test_distributed_checkpoint_sees_an_ordinary_model():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    packed, plain = packed_and_plain()
    state = get_model_state_dict(packed)
    assert set(state) == set(plain.state_dict())
    set_model_state_dict(packed, {k: v * 2 for k, v in state.items()})
    assert torch.equal(packed.up.weight, plain.up.weight * 2)
    assert torch.equal(packed.up.values, packed.up.weight.view(-1)[packed.up.indices.long()])


def test_a_weight_changed_behind_the_back_is_reported_by_unpack(caplog):
    packed, _ = packed_and_plain()
    with torch.no_grad():
        packed.up.weight.mul_(2)
    with caplog.at_level(logging.WARNING, logger="lift_kernels"):
        unpack(packed)
    assert [r.getMessage().split(" was")[0] for r in caplog.records] == ["up"]


def test_copies_are_compact_and_independent():
    packed, _ = packed_and_plain()
    optimizer = LiftAdamW(lift_param_groups(packed), **OPTIONS, lr=0.1)
    optimizer.refresh()
    copied = copy.deepcopy(packed)
    assert copied.up.indices.untyped_storage().nbytes() == 4 * copied.up.indices.numel()
    copied(data(4, 12)).sum().backward()
    assert copied.up.values.grad is not None and packed.up.values.grad is None
    with torch.no_grad():
        copied.up.values.zero_()
    assert packed.up.values.any()


def test_fully_shard_is_refused_with_a_remedy(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    packed, _ = packed_and_plain()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="up: fully_shard cuts values.*matrix mode"):
            fully_shard(packed, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
    finally:
        distributed.destroy_process_group()
