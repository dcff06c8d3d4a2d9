"""Arenas of several matrices, the fp64 result of a step on them, and the comparison.

Truth and yardstick are torch's own for-loop AdamW on the packed entries. In fp64 it gives the right
result, and in fp32 it shows how large an ordinary error is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from helpers.backends import BackendDevice
from helpers.bits import FP32, assert_near, assert_same_bits, bits, random_indices
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from lift_kernels import ops
from lift_kernels.ops import reference

GAP_INDEX, GAP_BIRTH = -123456789, 2**30
BORDER = 64
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@dataclass
class Problem:
    """The arguments of a step.

    Arenas have gaps before, between and after the segments. Weights have NaN borders.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    indices: Tensor
    offsets: list[int]
    counts: list[int]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    master: Tensor | None
    births: Tensor | None
    packed: bool
    buffers: list[Tensor] = field(default_factory=list)  # the weights with their borders

    def step(self, backend: BackendDevice, /, advance: bool = True, **options) -> None:
        """Call the op once; ``options`` override `HYPER`."""
        if advance:
            self.steps += 1
        given = {"master": self.master, "births": self.births, "packed_grads": self.packed, "backend": backend.name}
        options = HYPER | given | options
        ops.sparse_adamw_(
            self.weights,
            self.grads,
            self.indices,
            self.offsets,
            self.counts,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            options.pop("lr"),
            **options,
        )

    def segment(self, i: int) -> slice:
        return slice(self.offsets[i], self.offsets[i] + self.counts[i])

    def index(self, i: int) -> Tensor:
        return self.indices[self.segment(i)].long()

    def copy(self) -> Problem:
        """A deep copy; each weight is still a view into its buffer."""
        return copy.deepcopy(self)

    def new_gradients(self, seed: int) -> None:
        """Replace the gradients by others of the same kind, in place."""
        generator = torch.Generator().manual_seed(seed)
        for grad in self.grads:
            grad.copy_(torch.randn(grad.shape, generator=generator))

    def state(self) -> dict[str, Tensor]:
        """Bit patterns of all that a step may write, with borders and gaps."""
        tensors = {f"weight {i}": buffer for i, buffer in enumerate(self.buffers)}
        tensors |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "master": self.master}
        return {name: bits(t).clone() for name, t in tensors.items() if t is not None}

    def inputs(self) -> dict[str, Tensor]:
        """Bit patterns of what a step only reads."""
        tensors = {f"grad {i}": grad for i, grad in enumerate(self.grads)}
        tensors |= {"indices": self.indices, "steps": self.steps, "births": self.births}
        return {name: bits(t).clone() for name, t in tensors.items() if t is not None}


def make_problem(
    backend,
    sizes: Sequence[tuple[tuple[int, int], int]] = (
        ((13, 17), 40),
        ((9, 8), 72),
        ((1, 1), 1),
        ((5, 3), 0),
        ((64, 31), 513),
    ),
    weight: torch.dtype = FP32,
    grad: torch.dtype = FP32,
    moment: torch.dtype = FP32,
    master: bool = False,
    births: bool = False,
    packed: bool = False,
    aligned: bool = True,
    step: int = 6,
    seed: int = 0,
) -> Problem:
    """Random matrices of ((m, n), k), after ``step`` steps of training.

    Moments have the size that gradients of size 1 give them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    offsets, end = [], 64 if aligned else 3
    for _, count in sizes:
        offsets.append(end)
        end += -(-count // 64) * 64 if aligned else count + 5
    length = end + 64
    indices = torch.full((length,), GAP_INDEX, dtype=torch.int32)
    ages = torch.full((length,), GAP_BIRTH, dtype=torch.int32)
    # Gaps hold both NaN and a number. A NaN spoils every sum, so it shows a read. It would survive
    # arithmetic, so a number is there to show a write.
    gap = torch.tensor([float("nan"), 777.0]).repeat(length // 2 + 1)[:length]
    moments, truth = gap.repeat(2, 1), gap.clone()
    buffers, weights, grads = [], [], []
    for ((m, n), count), offset in zip(sizes, offsets):
        segment = slice(offset, offset + count)
        indices[segment] = random_indices(m * n, count, generator)
        ages[segment] = torch.randint(0, step + 1, (count,), generator=generator)
        moments[0, segment] = 0.2 * normal(count)
        moments[1, segment] = moments[0, segment].square() + 0.1 * normal(count).square()
        dense = 0.05 * normal(m * n)
        truth[segment] = dense[indices[segment].long()]
        buffer = torch.full((m * n + 2 * BORDER,), float("nan"), dtype=weight)
        buffer[BORDER:-BORDER] = dense
        buffers.append(buffer.to(backend.device))
        weights.append(buffers[-1][BORDER:-BORDER].view(m, n))
        grads.append(normal(*((count,) if packed else (m, n))).to(backend.device, grad))
    steps = step + torch.arange(len(sizes)) if step else torch.zeros(len(sizes))
    if step == 0:
        for offset, (_, count) in zip(offsets, sizes):
            moments[:, offset : offset + count] = 0.0

    def put(tensor, dtype=None):
        return tensor.to(backend.device, dtype, copy=True)

    return Problem(
        weights,
        grads,
        put(indices),
        offsets,
        [count for _, count in sizes],
        put(moments[0], moment),
        put(moments[1], moment),
        put(steps, FP32),
        put(truth) if master else None,
        put(ages) if births else None,
        packed,
        buffers,
    )


@dataclass(frozen=True)
class Entries:
    """The selected entries of a matrix after AdamW."""

    w: Tensor
    m: Tensor
    v: Tensor


def pooled(parts: list[Entries]) -> Entries:
    """Join the entries of several matrices.

    Errors are judged by the largest entry of all.
    """
    return Entries(*(torch.cat([getattr(part, name) for part in parts]) for name in ("w", "m", "v")))


def torch_step(problem: Problem, i: int, dtype: torch.dtype, **options) -> Entries:
    """Take one step of torch's for-loop AdamW in ``dtype`` on the entries of matrix i.

    Entries of one age go together.
    """
    options = HYPER | options
    segment, index = problem.segment(i), problem.index(i)
    flat, grad = problem.weights[i].reshape(-1), problem.grads[i].reshape(-1)
    w = (flat[index] if problem.master is None else problem.master[segment]).to(dtype, copy=True)
    g = (grad if problem.packed else grad[index]).to(dtype) * float(options.get("inv_scale", 1.0))
    m, v = problem.exp_avg[segment].to(dtype, copy=True), problem.exp_avg_sq[segment].to(dtype, copy=True)
    step = problem.steps[i]
    ages = step.expand(problem.counts[i]) if problem.births is None else step - problem.births[segment]
    for age in ages.unique():
        at = ages == age
        # The functional form counts the step itself, on the CPU.
        one = [[x[at]] for x in (w, g, m, v)]
        torch_adamw(
            *one,
            [],
            [age.cpu() - 1],
            foreach=False,
            fused=False,
            amsgrad=False,
            maximize=options.get("maximize", False),
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            lr=float(options["lr"]),
            eps=options["eps"],
            weight_decay=options["weight_decay"],
        )
        w[at], m[at], v[at] = one[0][0], one[2][0], one[3][0]
    return Entries(w, m, v)


def assert_stepped(before: Problem, after: Problem, **options) -> None:
    """Check that ``after`` is ``before`` one step later.

    Trained entries are as the contract says, and every other bit is unchanged.
    """
    expected = before.state()
    if sum(after.counts) == 0:
        return assert_same_bits(after.state(), expected)
    before = dataclasses.replace(before, steps=after.steps)
    matrices = range(len(after.weights))
    truth, yardstick = (
        pooled([torch_step(before, i, dtype, **options) for i in matrices]) for dtype in (torch.float64, FP32)
    )
    arena = torch.cat([torch.arange(after.offsets[i], after.offsets[i] + after.counts[i]) for i in matrices])
    arena = arena.to(after.indices.device)
    stored = torch.cat([after.weights[i].reshape(-1)[after.index(i)] for i in matrices])
    assert_near(after.exp_avg[arena], truth.m, yardstick.m, "exp_avg")
    assert_near(after.exp_avg_sq[arena], truth.v, yardstick.v, "exp_avg_sq")
    if after.master is not None:
        assert_near(after.master[arena], truth.w, yardstick.w, "master")
        assert torch.equal(bits(stored), bits(after.master[arena].to(stored.dtype))), (
            "the weight is not its rounded master"
        )
    elif options.get("stochastic"):
        keys = torch.repeat_interleave(
            reference.stochastic_key(after.steps, options["seed"]).cpu(), torch.tensor(after.counts)
        )
        noise = reference.counter_hash(reference.counter_hash(arena) ^ keys.to(arena.device))
        rounding = functools.partial(reference.round_stochastic_ref, noise=noise, dtype=stored.dtype)
        assert_near(stored, truth.w, yardstick.w, "weight", rounding)
    else:
        assert_near(stored, truth.w, yardstick.w, "weight")
    # Put the selected entries into the old state. Everything else must be unchanged.
    for i in matrices:
        expected[f"weight {i}"][BORDER + after.index(i)] = bits(after.weights[i]).reshape(-1)[after.index(i)]
    for name, tensor in (("exp_avg", after.exp_avg), ("exp_avg_sq", after.exp_avg_sq), ("master", after.master)):
        if tensor is not None:
            expected[name][arena] = bits(tensor[arena])
    assert_same_bits(after.state(), expected)


def step_and_check(backend: BackendDevice, problem: Problem, /, **options):
    """Take one step and check it against the truth; inputs must not change."""
    before, inputs = problem.copy(), problem.inputs()
    problem.step(backend, **options)
    assert_stepped(before, problem, **options)
    inputs["steps"] = bits(problem.steps)
    assert_same_bits(problem.inputs(), inputs)
