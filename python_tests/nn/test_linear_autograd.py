"""LiftLinear has the gradients of a plain layer, however the layer is used."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, random_indices
from helpers.packed_layers import assert_same_gradients, data, packed_and_plain
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lift_kernels import LiftLinear, lift_linear, unpack


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_gradcheck_in_float64(transposed):
    """Checked are x, bias and values.

    A wrapper puts the values into a copy of the weight.
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
    layer(x).sum().backward()  # the input needs no gradient
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
    """An input is kept for the weight gradient alone.

    A layer without trained values keeps none, as a frozen layer does.
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
    """Many small gradients follow a large one; a sum in the weight's dtype would lose them."""
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
    for step in range(2):  # a new index list of the same length causes no new compilation
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


def test_a_pass_looks_at_no_signature(monkeypatch):
    """torch does for a Function with setup_context, which takes longer than a small product."""
    packed, _ = packed_and_plain()
    monkeypatch.setattr(inspect, "signature", lambda *_: pytest.fail("a signature was looked at"))
    packed(data(5, 12)).sum().backward()
    assert all(p.grad is not None for name, p in packed.named_parameters() if name.endswith("values"))


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
