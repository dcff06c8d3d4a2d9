"""Quantized layers are refused by name. The classes here imitate those of the libraries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients


def of_library(library, base, name):
    """A class that says it comes from another library."""
    return type(name, (base,), {"__module__": f"{library}.nn.modules"})


def bitsandbytes():
    layer = of_library("bitsandbytes", nn.Linear, "Linear4bit")(32, 64)
    layer.weight = nn.Parameter(torch.zeros(32 * 64 // 2, 1, dtype=torch.uint8), requires_grad=False)
    return layer


def bitsandbytes_8_bit():
    layer = of_library("bitsandbytes", nn.Linear, "Linear8bitLt")(32, 64)
    layer.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    return layer


def torchao():
    """The layer is an nn.Linear, and the weight calls itself float32."""
    layer = nn.Linear(32, 64)
    subclass = of_library("torchao", torch.Tensor, "Int8Tensor")
    layer.weight = nn.Parameter(torch.zeros(64, 32).as_subclass(subclass))
    assert layer.weight.dtype == torch.float32
    return layer


class Gptq(nn.Module):
    """No nn.Linear, and no weight."""

    def __init__(self, codes="qweight"):
        super().__init__()
        self.register_buffer(codes, torch.zeros(4, 64, dtype=torch.int32))


class FP8Linear(nn.Linear):
    def __init__(self):
        super().__init__(32, 64, bias=False)
        self.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.ones(1, 1))


class Mxfp4Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj_blocks = nn.Parameter(torch.zeros(4, 8, 2, 16, dtype=torch.uint8), requires_grad=False)
        self.gate_up_proj_scales = nn.Parameter(torch.zeros(4, 8, 2, dtype=torch.uint8), requires_grad=False)


class Fp8Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 16, dtype=torch.float8_e4m3fn), requires_grad=False)


class Aqlm(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4, 8, 1, dtype=torch.int8), requires_grad=False)
        self.codebooks = nn.Parameter(torch.zeros(1, 256, 1, 8))


KINDS = [
    (bitsandbytes, "bitsandbytes Linear4bit"),
    (bitsandbytes_8_bit, "bitsandbytes Linear8bitLt"),
    (torchao, "torchao Int8Tensor"),
    (Gptq, "Gptq.qweight"),
    (lambda: Gptq("weight_packed"), "Gptq.weight_packed"),
    (lambda: Gptq("W_q"), "Gptq.W_q"),
    (Aqlm, "Aqlm.codebooks"),
    (FP8Linear, "torch.float8_e4m3fn"),
    (Mxfp4Experts, "Mxfp4Experts.gate_up_proj_blocks"),
    (Fp8Experts, "torch.float8_e4m3fn"),
    (lambda: torch.ao.nn.quantized.dynamic.Linear(32, 64), "torch Linear"),
]


@pytest.mark.parametrize(("make", "label"), KINDS, ids=[label for _, label in KINDS])
def test_a_quantized_layer_is_refused_by_name(make, label):
    model = nn.Sequential(nn.Linear(32, 32), make())
    for action in (lift_param_groups, pack_gradients):
        with pytest.raises(ValueError, match=rf"^1 is quantized \({label}; .*quantization_config.* exclude="):
            action(model, freeze_rest=True)
    assert type(model[0]) is nn.Linear and model[0].bias.requires_grad
    (group,) = lift_param_groups(model, exclude=r"^1\.")
    assert [name for name, _ in group["params"]] == ["0.weight"]


def test_a_quantized_output_head_is_left_out_as_all_heads():
    model = nn.Sequential(nn.Linear(32, 32))
    model.lm_head = FP8Linear()
    assert [name for name, _ in lift_param_groups(model)[0]["params"]] == ["0.weight"]


@pytest.mark.parametrize(
    ("make", "label"),
    [(bitsandbytes, "torch.uint8"), (torchao, "torchao Int8Tensor"), (FP8Linear, "torch.float8_e4m3fn")],
)
def test_the_optimizer_refuses_a_quantized_weight(make, label):
    """As of ``LiftAdamW(model.parameters())``."""
    with pytest.raises(TypeError, match=rf"^layer: the weight is quantized \({label}\)"):
        LiftAdamW([("layer", make().weight)])


def test_other_scales_and_blocks_are_no_codes():
    layer = nn.Linear(8, 8)
    layer.layer_scales = nn.Parameter(torch.ones(8))
    layer.register_buffer("attention_blocks", torch.ones(8, dtype=torch.int64))
    layer.register_buffer("codebooks", torch.ones(2, 8))  # of a vector quantizer
    assert len(lift_param_groups(nn.Sequential(layer))[0]["params"]) == 1
