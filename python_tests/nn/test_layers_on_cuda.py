"""Packed layers and hooks in training, on a GPU and in the same way on the CPU.

Gradients are compared with those of a plain copy of the model on the same device, before and after
a refresh.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers.bits import BF16, FP32, bits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.nn.linear import LiftConv1D, PackedLinear

MASK = {"rank": 4, "density": 0.1}
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Mixed(nn.Module):
    """A linear layer, a Conv1D with its transposed weight, and experts, which get a hook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.up, self.mid = nn.Linear(24, 40), Conv1D(33, 40)
        self.experts = nn.Parameter(0.2 * torch.randn(3, 33, 20))

    def forward(self, x):
        hidden = F.silu(self.mid(F.silu(self.up(x))))
        return torch.einsum("...n,enm->...m", hidden, self.experts.to(hidden.dtype))


def plainly(model):
    return model


def checkpointed(model):
    return lambda x: checkpoint(model, x, use_reentrant=False)


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


# name: what calls the model, and whether under autocast
USES = {
    "plain": (plainly, False),
    "autocast": (plainly, True),
    "checkpoint": (checkpointed, False),
    "checkpoint, autocast": (checkpointed, True),
    "compile": (compiled, False),
    "compile, autocast": (compiled, True),
}


def packed_gradients(model):
    """Name of a weight: its packed gradient and index list."""
    found = {f"{n}.weight": (m.values.grad, m.indices) for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    return found | {"experts": (model.experts.lift_grad, model.experts.lift_indices)}


@pytest.mark.parametrize(
    "name, device",
    [(name, "cpu") for name in USES]
    # Compilation takes seconds, so a GPU does it once.
    + [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in USES if name != "compile"],
)
def test_gradients_are_those_of_a_plain_model(name, device):
    """Over two masks, with two micro-batches each."""
    use, autocast = USES[name]
    packed = Mixed().to(device)
    plain = copy.deepcopy(packed)
    optimizer = LiftAdamW(
        pack_gradients(packed, extra="experts", selection="magnitude", **MASK),
        lr=0.05,
        selection="magnitude",
        refresh_interval=None,
    )
    assert isinstance(packed.mid, LiftConv1D)
    call = use(packed)
    generator = torch.Generator().manual_seed(2)
    for number in range(3):
        plain.load_state_dict(packed.state_dict())
        plain.zero_grad()
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(2, 6, 24, generator=generator).to(device)
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            outputs = []
            for way, own in zip((call, plain), inputs):
                with torch.autocast(device, BF16) if autocast else contextlib.nullcontext():
                    outputs.append(way(own).float())
                outputs[-1].square().mean().backward()
            near(*outputs, autocast, "output")
            near(*(own.grad for own in inputs), autocast, "gradient of the input")
        for key, (values, index) in packed_gradients(packed).items():
            expected = plain.get_parameter(key).grad.reshape(-1)[index.long()].float()
            assert values.dtype == FP32 and values.device.type == device
            near(values, expected, autocast, key)
        optimizer.step()
        if number == 1:
            optimizer.zero_grad()
            optimizer.refresh()
            assert optimizer.last_refresh.overlap < 1
    assert packed_gradients(packed)["experts"][0] is None, "a step uses up what a hook has packed"


def near(found, expected, autocast, label):
    """Products may be summed in another order; under autocast they are rounded to bf16."""
    tolerance = (2.0**-6 if autocast else 2.0**-18) * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{label}: {text}")


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"bias_correction": "per_entry", "state_dtype": BF16}])
@on_both
def test_packed_layers_are_trained_as_matrices_are(device, options, dtype):
    """From the same gradients, to the bit, with two refreshes."""
    packed = Mixed().to(device, dtype)
    matrices = copy.deepcopy(packed)
    options = dict(lr=0.05, weight_decay=0.1, selection="magnitude", refresh_interval=None) | MASK | options
    groups = pack_gradients(packed, extra="experts", selection="magnitude", **MASK)
    mine, theirs = LiftAdamW(groups, **options), LiftAdamW(lift_param_groups(matrices, extra="experts"), **options)
    dense = {name: matrices.get_parameter(name) for name in ("up.weight", "mid.weight", "experts")}
    generator = torch.Generator().manual_seed(3)
    for number in range(6):
        for p in dense.values():
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        for name, layer in (("up.weight", packed.up), ("mid.weight", packed.mid)):
            layer.values.grad = dense[name].grad.view(-1)[layer.indices.long()].float()
        packed.experts.lift_grad = dense["experts"].grad.view(-1)[packed.experts.lift_indices.long()].float()
        mine.step()
        theirs.step()
        for name, p in dense.items():
            assert torch.equal(bits(packed.get_parameter(name).detach()), bits(p.detach())), (number, name)
        if number in (2, 4):
            mine.refresh(drop_gradients=True)
            theirs.refresh()
            assert mine.last_refresh.overlap == theirs.last_refresh.overlap < 1
