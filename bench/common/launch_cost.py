"""Counts what launches on fake CUDA tensors move and compute, and predicts their time on a card.

Nothing here is timed. `LaunchCost` is a recording of `bench.common.fake_cuda`. It counts

- launches: torch calls that compute something, at one launch each, although a library call may make
  more; and the launches of the package's kernels (`bench.common.kernel_costs`)
- waits of the host for the device
- bytes: every tensor that a launch reads and every tensor that it writes, once. A tensor that is
  changed in place counts twice. Of a gather or a scatter only the elements count that move. Views
  cost nothing. A copy between host and device counts where it meets the memory of the device
- FLOPs of products, Cholesky factorizations and triangular solves. The unit follows from the dtypes
  of the factors: bf16 for 16-bit ones; for fp32 ones TF32 where torch's switch allows it at that
  moment, else fp32
- eigenproblems, each with its side, and the calls that solve them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.common.device_events import Call, Event, Recording
from bench.common.kernel_costs import NATIVE, TRITON, Work, size

QUANTITIES = (
    *("launches", "waits", "bytes", "bf16_flops", "tf32_flops", "fp32_flops"),
    *("eigenproblems", "eigenproblem_calls"),
)

FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Products of matrices, and which of their arguments is the left factor."""
ONLY_WRITTEN = {"copy_", "fill_", "zero_", "random_", "normal_", "uniform_"}
"""Ops that do not read the tensor that they write."""
GATHERS = {"index", "gather", "index_select", "take", "embedding"}
"""Ops that read as many elements of their first argument as they return."""
SCATTERS = {"index_put_": 2, "scatter_": 3, "index_copy_": 3}
"""Ops that write as many elements of their first argument as this argument has."""


class Step(NamedTuple):
    """A launch with its work or a wait, which has none, and the part that it belongs to."""

    part: str
    work: Work | None


class LaunchCost(Recording):
    """A recording that keeps the work of each launch.

    Attributes:
        steps: launches and waits in the order in which they came.

    Args:
        part: says for an event which part of the whole it belongs to. The call is None for a wait.

    Raises ValueError at a kernel of the package without a formula.
    """

    def __init__(self, part: Callable[[Event, Call | None], str] = lambda event, call: "") -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._part = part

    def waited(self, event: Event) -> None:
        super().waited(event)
        self.steps.append(Step(self._part(event, None), None))

    def launched(self, event: Event, call: Call) -> None:
        super().launched(event, call)
        part = self._part(event, call)
        self.steps += [Step(part, work) for work in works(call)]


def totals(steps: Iterable[Step]) -> Counter[tuple[str, str]]:
    """The sums of `QUANTITIES`, by part and quantity."""
    sums: Counter[tuple[str, str]] = Counter()
    for part, work in steps:
        amounts: Iterable[float] = (0, 1)
        if work is not None:
            flops = work.bf16, work.tf32, work.fp32
            amounts = 1, 0, work.bytes, *flops, work.problems, int(work.problems > 0)
        sums.update({(part, quantity): amount for quantity, amount in zip(QUANTITIES, amounts) if amount})
    return sums


def works(call: Call) -> list[Work]:
    """What the launches of a call do. Most calls make one.

    Raises ValueError for a kernel of the package without a formula.
    """
    if isinstance(call.op, str):
        if "side" in call.kwargs:  # cuSOLVER's batched solver, which works in place
            side, problems = call.kwargs["side"], call.kwargs["batch"]
            return [Work(4 * problems * side * (2 * side + 1), side=side, problems=problems)]
        return [Work(size(*tensors(call.args)))]
    if not isinstance(call.op, torch._ops.OpOverload):
        return [_formula(TRITON, call.op.fn.__name__)(call.kwargs)]
    name = _name(call.op)
    if call.op.namespace == "lift_kernels_native":
        return _formula(NATIVE, name)(*call.args, **call.kwargs)
    return [_torch_work(name, call)]


def is_product(call: Call) -> bool:
    """Whether a call is a product of matrices."""
    return isinstance(call.op, torch._ops.OpOverload) and _name(call.op) in FACTORS


def _name(op: torch._ops.OpOverload) -> str:
    return op._schema.name.partition("::")[2]


def _formula(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"{name} has no formula; add one to bench/common/kernel_costs.py")
    return table[name]


def _torch_work(name: str, call: Call) -> Work:
    moved = _moved(name, call)
    if name in FACTORS:
        at = FACTORS[name]
        left, right = call.args[at : at + 2]
        return Work(moved, **{unit_of(left, right): 2 * call.out.numel() * left.shape[-1]})
    if name == "_linalg_eigh":
        matrices = call.args[0]
        return Work(moved, side=matrices.shape[-1], problems=matrices.numel() // max(1, matrices.shape[-1] ** 2))
    if name == "linalg_solve_triangular":
        return Work(moved, fp32=call.args[1].numel() * call.args[0].shape[-1])
    if name == "linalg_cholesky_ex":
        return Work(moved, fp32=call.args[0].numel() * call.args[0].shape[-1] / 3)
    return Work(moved)


def unit_of(left: Tensor, right: Tensor) -> str:
    """The unit that forms a product now: ``"bf16"``, ``"tf32"`` or ``"fp32"``."""
    if left.element_size() == 2 and right.element_size() == 2:
        return "bf16"
    tf32 = left.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "fp32"


def _moved(name: str, call: Call) -> float:
    """Bytes that a torch op reads and writes in the memory of the device."""
    few = None  # elements of the first argument that move
    if name in GATHERS and call.out is not None:
        few = call.out.numel()
    elif name in SCATTERS:
        few = call.args[SCATTERS[name]].numel()
    arguments = call.op._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, call.args)} | call.kwargs
    counted, moved = set(), 0
    for number, argument in enumerate(arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        read_too = written and not (argument.kwarg_only or name in ONLY_WRITTEN or name in SCATTERS)
        for t in tensors(given.get(argument.name)):
            if _memory(t) not in counted:
                counted.add(_memory(t))
                moved += (1 + read_too) * (few * t.element_size() if few is not None and number == 0 else size(t))
    return moved + sum(size(t) for t in tensors(call.out) if _memory(t) not in counted)


def tensors(values: Any) -> list[Tensor]:
    """The tensors on the device among these values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]


def _memory(t: Tensor) -> tuple[int, int, int]:
    """What two views of the same elements have in common, such as a matrix and its transpose."""
    return t.untyped_storage()._cdata, t.storage_offset(), size(t)
