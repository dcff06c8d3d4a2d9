"""Arenas whose matrices get new index lists, and what must become of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from helpers.bits import FP32, bits
from helpers.step_problems import BORDER, GAP_BIRTH, GAP_INDEX
from torch import Tensor

from lift_kernels import ops

# NaN of both kinds and signs, infinity, -0, a subnormal number: arithmetic would change bits.
AWKWARD = [0x7FC12345, -0x3FEDCC, 0x7F812345, -0x7EDCBB, 0x7F800000, -0x80000000, 1, 0x7FFFFFFF]


@dataclass
class Migration:
    """The arguments of `arena_migrate_`. Arenas have gaps, and weights have NaN borders."""

    weights: list[Tensor]
    new_indices: list[Tensor]
    indices: Tensor
    offsets: list[int]
    counts: list[int]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    master: Tensor | None
    births: Tensor | None
    buffers: list[Tensor]  # the weights with their borders

    def run(self, backend: str | None, **options) -> Tensor:
        return ops.arena_migrate_(
            self.weights,
            self.new_indices,
            self.indices,
            self.offsets,
            self.counts,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            backend=backend,
            **{"master": self.master, "births": self.births} | options,
        )

    def copy(self) -> Migration:
        """A deep copy; each weight is still a view into its buffer."""
        return copy.deepcopy(self)

    def arenas(self) -> dict[str, Tensor]:
        names = ("indices", "exp_avg", "exp_avg_sq", "master", "births")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def state(self) -> dict[str, Tensor]:
        """Bit patterns of the whole arenas."""
        return {name: bits(arena).clone() for name, arena in self.arenas().items()}

    def inputs(self) -> dict[str, Tensor]:
        """Bit patterns of what is only read."""
        tensors = {f"weight {i}": buffer for i, buffer in enumerate(self.buffers)} | {"steps": self.steps}
        tensors |= {f"new_indices {i}": new for i, new in enumerate(self.new_indices)}
        return {name: bits(tensor).clone() for name, tensor in tensors.items()}

    def expected(self) -> tuple[dict[str, Tensor], list[int]]:
        """The state and the counts of entries that stay, by a lookup of each in a dictionary."""
        after, kept = {name: pattern.tolist() for name, pattern in self.state().items()}, []
        before = {name: list(values) for name, values in after.items()}
        for i, (weight, new) in enumerate(zip(self.weights, self.new_indices)):
            offset = self.offsets[i]
            place = {before["indices"][at]: at for at in range(offset, offset + self.counts[i])}
            entering = {"exp_avg": lambda index: 0, "exp_avg_sq": lambda index: 0}
            exact = bits(weight.float()).view(-1).tolist()
            entering |= {"master": exact.__getitem__, "births": lambda index, i=i: int(self.steps[i])}
            for at, index in enumerate(new.tolist(), start=offset):
                for name in after.keys() - {"indices"}:
                    after[name][at] = before[name][place[index]] if index in place else entering[name](index)
                after["indices"][at] = index
            kept.append(sum(index in place for index in new.tolist()))
        device = self.indices.device
        return {
            name: torch.tensor(values, dtype=bits(self.arenas()[name]).dtype, device=device)
            for name, values in after.items()
        }, kept


def make_migration(
    backend,
    lists: Sequence[tuple[int, Sequence[int], Sequence[int]]],
    weight: torch.dtype = FP32,
    moment: torch.dtype = FP32,
    master: bool = True,
    births: bool = True,
    aligned: bool = True,
    seed: int = 0,
) -> Migration:
    """Random matrices of (entries, old list, new list).

    Their segments lie in the arenas from the last one to the first, with room for both lists.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets, end = [], 64 if aligned else 3
    for _, old, new in reversed(lists):
        offsets.insert(0, end)
        room = max(len(old), len(new))
        end += -(-room // 64) * 64 if aligned else room + 5
    length = end + 64
    indices = torch.full((length,), GAP_INDEX, dtype=torch.int32)
    ages = torch.full((length,), GAP_BIRTH, dtype=torch.int32)
    # Every pattern can be met in a segment and in a gap.
    patterns = torch.randint(-(2**31), 2**31, (3, length), generator=generator).int()
    patterns[:, ::5] = torch.tensor(AWKWARD, dtype=torch.int32).repeat(length)[: len(range(0, length, 5))]
    buffers, weights = [], []
    for (numel, old, _), offset in zip(lists, offsets):
        segment = slice(offset, offset + len(old))
        indices[segment] = torch.as_tensor(old, dtype=torch.int32)
        ages[segment] = torch.randint(0, 9, (len(old),), generator=generator).int()
        buffer = torch.full((numel + 2 * BORDER,), float("nan"), dtype=weight)
        buffer[BORDER:-BORDER] = torch.randn(numel, generator=generator)
        buffers.append(buffer.to(backend.device))
        shape = (2, numel // 2) if numel % 2 == 0 else (numel,)
        weights.append(buffers[-1][BORDER : BORDER + numel].view(shape))

    def moments(row):
        return row.view(FP32).clone() if moment == FP32 else (row & 0xFFFF).to(torch.int16).view(moment)

    return Migration(
        weights,
        [torch.as_tensor(new, dtype=torch.int32).to(backend.device, copy=True) for _, _, new in lists],
        indices.to(backend.device),
        offsets,
        [len(old) for _, old, _ in lists],
        moments(patterns[0]).to(backend.device),
        moments(patterns[1]).to(backend.device),
        (torch.arange(len(lists)) * 7.0 + 3).to(backend.device),
        patterns[2].view(FP32).clone().to(backend.device) if master else None,
        ages.to(backend.device) if births else None,
        buffers,
    )
