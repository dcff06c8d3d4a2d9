"""The state dict, conversions and copies of a packed model are those of the plain one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.bits import BF16, FP16, FP32, bits
from helpers.packed_layers import OPTIONS, data, packed_and_plain
from helpers.small_models import TwoLinears

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.nn.linear import PackedLinear


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_stay_fp32_through_conversions(dtype):
    """Values, index list and gradient keep every bit, while the weight is converted."""
    model = TwoLinears()
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
    other = TwoLinears()
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
    """In bf16 a value that rounds to the loaded weight is more exact than the weight."""
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
