"""Steps whose state has other forms: 8-bit moments, low halves of masters, packed weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from helpers.backends import BackendDevice
from helpers.bits import BF16, bits
from helpers.step_problems import BORDER, Entries, Problem, make_problem, pooled, torch_step
from torch import Tensor

from lift_kernels.ops.state_formats import GROUP, decode, encode_first, encode_root, groups_of, join_master

GAP_CODE = 85


@dataclass
class FormProblem(Problem):
    """A `Problem` with scales of codes, and whose weights may be packed."""

    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    packed_weights: bool = False

    def step(self, backend: BackendDevice, /, advance: bool = True, **options) -> None:
        forms = {"exp_avg_scale": self.exp_avg_scale, "exp_avg_sq_scale": self.exp_avg_sq_scale}
        super().step(backend, advance, **forms | {"packed_weights": self.packed_weights} | options)

    def state(self) -> dict[str, Tensor]:
        scales = {"exp_avg_scale": self.exp_avg_scale, "exp_avg_sq_scale": self.exp_avg_sq_scale}
        return super().state() | {name: bits(x).clone() for name, x in scales.items() if x is not None}

    def index(self, i: int) -> Tensor:
        return torch.arange(self.counts[i]) if self.packed_weights else super().index(i)

    def groups(self, i: int) -> slice:
        first = self.offsets[i] // GROUP
        return slice(first, first + groups_of(self.counts[i]))

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        """The moments of matrix i in fp32; the second one as the root where it is stored so."""
        m, v = self.exp_avg[self.segment(i)], self.exp_avg_sq[self.segment(i)]
        if self.exp_avg_scale is None:
            return m.float(), v.float()
        return decode(m, self.exp_avg_scale[self.groups(i)]), decode(v, self.exp_avg_sq_scale[self.groups(i)])

    def masters(self, i: int) -> Tensor:
        """The fp32 weights of the selected entries of matrix i."""
        weight = self.weights[i].reshape(-1)[self.index(i)]
        if self.master is None:
            return weight.float()
        master = self.master[self.segment(i)]
        return join_master(weight, master) if master.dtype == torch.int16 else master

    def plain(self) -> Problem:
        """The same problem with fp32 moments and masters."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Problem)}
        moments = torch.zeros(2, len(self.indices))
        master = torch.zeros(len(self.indices))
        for i in range(len(self.weights)):
            m, v = self.moments(i)
            moments[0, self.segment(i)] = m
            moments[1, self.segment(i)] = v.square() if self.exp_avg_scale is not None else v
            master[self.segment(i)] = self.masters(i)
        return Problem(**shared | {"exp_avg": moments[0], "exp_avg_sq": moments[1], "master": master})

    def stepped(self, dtype: torch.dtype, **options) -> Entries:
        """All selected entries after a step by torch in ``dtype``; ``steps`` are those after it."""
        problem = self.plain()
        problem.index = self.index
        return pooled([torch_step(problem, i, dtype, **options) for i in range(len(self.weights))])


def make_forms(
    backend,
    *arguments,
    coded: bool = False,
    split: bool = False,
    packed_weights: bool = False,
    packed: bool = False,
    **kinds,
) -> FormProblem:
    """The problem of `make_problem` with other forms of state. Gaps hold patterns of their own."""
    packed = packed or packed_weights
    problem = make_problem(backend, *arguments, packed=packed, **kinds | ({"weight": BF16} if split else {}))
    problem = FormProblem(**vars(problem))
    matrices = range(len(problem.weights))
    if packed_weights:
        buffers = [torch.full((count + 2 * BORDER,), float("nan")) for count in problem.counts]
        for i in matrices:
            buffers[i][BORDER:-BORDER] = problem.weights[i].view(-1)[problem.index(i)].float()
        problem.buffers = [buffer.to(problem.weights[0].dtype).to(backend.device) for buffer in buffers]
        problem.weights = [buffer[BORDER:-BORDER] for buffer in problem.buffers]
        problem.packed_weights = True
    length = len(problem.indices)
    if coded:
        moments = problem.exp_avg.float(), problem.exp_avg_sq.float().sqrt()
        problem.exp_avg = torch.full((length,), GAP_CODE, dtype=torch.int8, device=backend.device)
        problem.exp_avg_sq = problem.exp_avg.view(torch.uint8).clone()
        gap = torch.tensor([float("nan"), 777.0]).repeat(groups_of(length) // 2 + 1)[: groups_of(length)]
        problem.exp_avg_scale, problem.exp_avg_sq_scale = (gap.to(backend.device, copy=True) for _ in range(2))
        for i in matrices:
            at, groups = problem.segment(i), problem.groups(i)
            problem.exp_avg[at], problem.exp_avg_scale[groups] = encode_first(moments[0][at])
            problem.exp_avg_sq[at], problem.exp_avg_sq_scale[groups] = encode_root(moments[1][at])
    if split:
        generator = torch.Generator().manual_seed(7)
        problem.master = torch.randint(-(2**15), 2**15, (length,), generator=generator).short().to(backend.device)
    return problem


def assert_codes_near(found: Tensor, expected: Tensor, label: str) -> None:
    """Check that codes are equal but for few that an fp32 rounding takes to a neighbor."""
    distance = (found.int() - expected.int()).abs()
    assert (distance <= 1).all(), f"{label}: codes differ by {distance.max()}"
    assert distance.sum() <= max(1, 0.005 * len(found)), f"{label}: {int(distance.sum())} of {len(found)} codes differ"


def assert_scales_near(found: Tensor, expected: Tensor, label: str) -> None:
    """Check that scales are equal but for a few ulp."""
    torch.testing.assert_close(found, expected, rtol=2.0**-20, atol=0, equal_nan=True, msg=f"{label} differs")
