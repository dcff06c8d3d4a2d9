"""Small models that need torch alone."""

from __future__ import annotations

import torch
from helpers.bits import FP32, bits
from torch import nn
from torch.nn import functional as F


class Small(nn.Module):
    """Two matrices and a bias, and a head that is tied to the first matrix."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(40, 30, bias=False), nn.Linear(30, 20)
        self.head = nn.Linear(40, 30, bias=False)
        self.to(dtype)
        self.head.weight = self.first.weight


def tuned(seed: int, dtype: torch.dtype = torch.bfloat16, share: float = 0.1) -> Small:
    """A copy of `Small` with other values at some of its entries, which ``seed`` chooses."""
    model = Small(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            chosen = torch.randperm(p.numel(), generator=generator)[: max(1, round(share * p.numel()))]
            p.view(-1)[chosen] += torch.randn(len(chosen), generator=generator).to(dtype)
    return model


def assert_equal_models(actual: nn.Module, expected: nn.Module) -> None:
    """Check that two models have the same parameters, to the bit."""
    for (name, a), (_, e) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(bits(a.detach()), bits(e.detach())), name


class TwoLinears(nn.Module):
    """Two linear layers and a norm; the first feeds the second."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(3)
        self.up, self.norm, self.down = nn.Linear(12, 20, bias), nn.LayerNorm(20), nn.Linear(20, 7, bias)

    def forward(self, x):
        return self.down(F.silu(self.norm(self.up(x))))


class ThreeLinears(nn.Module):
    def __init__(self, dtype=FP32):
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 33), nn.Linear(33, 17, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.c(F.silu(self.b(F.silu(self.a(x)))))
