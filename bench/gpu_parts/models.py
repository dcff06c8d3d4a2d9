"""Shapes of the linear matrices of two models, and random weights and masks for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.common.arenas import Arena, clustered_indices

DENSITY = 0.05
BF16, FP32 = torch.bfloat16, torch.float32
DISTINCT = 4
"""Layers with masks of their own. The others take these in turns, on other weights."""


@dataclass(frozen=True)
class Model:
    """``layer``: the matrices of one layer, rows x columns."""

    name: str
    layer: tuple[tuple[int, int], ...]
    layers: int = 32

    def on(self, device: str) -> Model:
        """Itself on a card. On the CPU two layers, all sides 64 times smaller."""
        return (
            self if device != "cpu" else Model(f"{self.name} / 64", tuple((m // 64, n // 64) for m, n in self.layer), 2)
        )

    @property
    def layer_entries(self) -> int:
        return sum(m * n for m, n in self.layer)

    def matrices(self, device: str, dtype: torch.dtype, scale: float, layers: int | None = None) -> list[Tensor]:
        """Normal entries, the same for the same device."""
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device, "dtype": dtype}
        return [torch.randn(shape, **options).mul_(scale) for shape in self.layer * (layers or self.layers)]

    def masks(self, device: str, layers: int | None = None) -> list[Tensor]:
        """Index lists, 5 % clustered by rows."""
        layers = layers or self.layers
        lists = [
            clustered_indices(*self.layer[i % len(self.layer)], DENSITY, i, device)
            for i in range(len(self.layer) * min(layers, DISTINCT))
        ]
        return [lists[i % len(lists)] for i in range(len(self.layer) * layers)]

    def arena(self, device: str, layers: int | None = None) -> Arena:
        return Arena.of(self.masks(device, layers))


LLAMA_2_7B = Model("LLaMA-2-7B", ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),))
LLAMA_3_8B = Model(
    "Llama-3-8B", ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
)


def dtype_name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP32: "fp32"}[dtype]
