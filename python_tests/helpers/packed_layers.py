"""The same model with and without packed gradients."""

from __future__ import annotations

import copy

import torch
from helpers.small_models import TwoLinears

from lift_kernels import pack_gradients
from lift_kernels.nn.linear import PackedLinear

OPTIONS = {"rank": 3, "density": 0.2}


def packed_and_plain(**options):
    """The same model twice; only the first has packed gradients."""
    plain = TwoLinears(**options)
    packed = copy.deepcopy(plain)
    pack_gradients(packed, **OPTIONS)
    return packed, plain


def data(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def assert_same_gradients(packed, plain, exact=True):
    """Check every gradient against the plain model, at the trained entries if a layer is packed."""
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
