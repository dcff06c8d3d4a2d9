"""Index lists in arenas, and random masks clustered like principal masks.

The ops under test work on these. An arena also counts the cache lines that its entries lie on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a CPU's cache line
SECTOR = 32  # bytes of what a GPU can read and write
FETCH = 64  # bytes of what it fetches for a sector, unless its limit is set to other ones
SEGMENT_ALIGN = 64  # entries; arena segments start at multiples of it


@dataclass
class Arena:
    """Index lists one behind the other, as the ops take them.

    Each list is padded to a multiple of `SEGMENT_ALIGN` entries.
    """

    indices: Tensor
    offsets: list[int]
    counts: list[int]

    @staticmethod
    def of(lists: Sequence[Tensor]) -> Arena:
        counts = [len(index) for index in lists]
        padded = [-(-count // SEGMENT_ALIGN) * SEGMENT_ALIGN for count in counts]
        offsets = [sum(padded[:i]) for i in range(len(lists))]
        indices = torch.zeros(sum(padded), dtype=torch.int32, device=lists[0].device)
        for offset, index in zip(offsets, lists):
            indices[offset : offset + len(index)] = index
        return Arena(indices, offsets, counts)

    @property
    def entries(self) -> int:
        return sum(self.counts)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """A vector as long as the arena."""
        return torch.zeros(len(self.indices), dtype=dtype, device=self.indices.device)

    def lists(self) -> list[Tensor]:
        return [self.indices[o : o + c] for o, c in zip(self.offsets, self.counts)]

    def line_bytes(self, width: int, line: int | None = None) -> int:
        """Bytes of the lines that hold the selected entries of all matrices.

        An entry has ``width`` bytes. A line has ``line``, by default what the device writes.
        """
        line = line or (LINE if self.indices.device.type == "cpu" else SECTOR)
        return line * sum(lines_touched(index, width, line) for index in self.lists())


def lines_touched(index: Tensor, width: int, line: int = LINE) -> int:
    """Distinct lines of ``line`` bytes that hold the sorted flat positions.

    The matrix starts on a line.
    """
    number = index // (line // width)
    return int((number[1:] != number[:-1]).sum()) + 1 if len(index) else 0


def clustered_indices(m: int, n: int, density: float, seed: int, device: str = "cpu") -> Tensor:
    """A random mask clustered by rows, as principal masks are: sorted flat int32 positions.

    It holds the largest entries of a Gaussian matrix with log-normal row scales of spread 0.45. The
    top 10 % of the rows then hold about 42 % of the entries.
    """
    generator = torch.Generator(device).manual_seed(seed)
    scale = torch.randn(m, 1, generator=generator, device=device).mul_(0.45).exp_()
    magnitude = torch.randn(m, n, generator=generator, device=device).abs_().mul_(scale).view(-1)
    k = round(density * m * n)
    if device == "cpu":
        threshold = float(np.partition(magnitude.numpy(), m * n - k)[m * n - k])
        return (magnitude >= threshold).nonzero().flatten()[:k].int()
    return magnitude.topk(k).indices.sort().values.int()


def neighbour(index: Tensor, numel: int, share: float = 0.95) -> Tensor:
    """Another sorted list of about the same length that keeps ``share`` of the entries."""
    generator = torch.Generator(index.device).manual_seed(1)
    stays = torch.rand(len(index), generator=generator, device=index.device) < share
    entering = torch.randint(numel, (round((1 - share) * len(index)),), generator=generator, device=index.device)
    return torch.cat([index[stays], entering.int()]).unique()
