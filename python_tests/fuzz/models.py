"""Small models of odd shapes, described by plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = 7
"""Rows of every input."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Block:
    """One layer.

    Attributes:
        kind: ``linear``, ``sub`` (a subclass of nn.Linear), ``conv1d``, ``tied`` (an nn.Linear with
            the weight of the block before), ``experts`` (a 3-D stack), ``norm``, ``attention`` or
            ``unused`` (an nn.Linear that no pass reaches).
        out: width of its output.
        dtype: a key of `DTYPES`.
        zero: whether the weight starts at zero.
    """

    kind: str
    out: int
    bias: bool
    dtype: str
    zero: bool = False


class SubLinear(nn.Linear):
    """A subclass, which may use its weight in ways that a packed layer does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 0.5


class Conv1D(nn.Module):
    """transformers' Conv1D: y = x W + b."""

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) * width**-0.5)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Two or three matrices in one stack; every row goes to all of them."""

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 + bias, out, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("td,eod->teo", x, self.weight).mean(1)


class Attention(nn.Module):
    """nn.MultiheadAttention of one head over the rows."""

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Norm(nn.LayerNorm):
    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__(width, bias=bias)


KINDS = {
    "linear": nn.Linear,
    "sub": SubLinear,
    "conv1d": Conv1D,
    "tied": nn.Linear,
    "experts": Experts,
    "norm": Norm,
    "attention": Attention,
    "unused": nn.Linear,
}
KEEPS_WIDTH = {"norm", "attention", "tied"}


class Model(nn.Module):
    """The blocks one behind the other, with an embedding and a tied head if there are ``words``."""

    def __init__(self, width: int, blocks: tuple[Block, ...], words: int) -> None:
        super().__init__()
        self.width, self.kinds = width, [block.kind for block in blocks]
        self.dtypes = [DTYPES[block.dtype] for block in blocks]
        self.embed = nn.Embedding(words, width) if words else None
        self.blocks = nn.ModuleList()
        for block in blocks:
            layer = KINDS[block.kind](width, width if block.kind in KEEPS_WIDTH else block.out, block.bias)
            if block.zero and block.kind == "linear":
                nn.init.zeros_(layer.weight)
            self.blocks.append(layer.to(DTYPES[block.dtype]))
            if block.kind == "tied":
                layer.weight = self.blocks[-2].weight
            width = width if block.kind in KEEPS_WIDTH | {"unused"} else block.out
        self.out = words or width
        self.lm_head = nn.Linear(width, words, bias=False) if words else None
        if self.lm_head is not None and width == self.width:
            self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.embed is not None:
            x = x + self.embed(tokens % self.embed.num_embeddings)
        for block, kind, dtype in zip(self.blocks, self.kinds, self.dtypes):
            if kind != "unused":
                x = torch.tanh(block(x.to(dtype)))
        if self.lm_head is not None:
            x = self.lm_head(x.float())
        return x

    def loss(self, number: int) -> Tensor:
        """The loss of the batch of this number."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(TOKENS, self.width, generator=generator)
        tokens = torch.randint(0, 1 << 20, (TOKENS,), generator=generator)
        target = torch.randn(TOKENS, self.out, generator=generator)
        return (self(x, tokens).double() - target).square().mean().float()


def build(seed: int, width: int, blocks: tuple[Block, ...], words: int) -> Model:
    """The model with weights that ``seed`` decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(width, blocks, words)
