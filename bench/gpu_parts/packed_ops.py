"""The packed ops on one matrix by each backend; norms and migrations on many matrices.

Bytes of the roofline: distinct sectors of the matrix (gather and dense norm read them, scatter
reads and writes them), 4 an entry of each index list, and packed values read or written. Calls on
one matrix take turns with tensors of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.common import timing
from bench.common.arenas import Arena, clustered_indices, neighbour
from bench.gpu_parts.models import BF16, DENSITY, FP32, LLAMA_2_7B, dtype_name
from bench.gpu_parts.runner import Run
from lift_kernels import ops
from lift_kernels.ops import dispatch

Op = Callable[[str | None], Tensor]


class Case:
    """One matrix with its list, a neighbouring list and values."""

    def __init__(self, m: int, n: int, dtype: torch.dtype, seed: int, device: str):
        generator = torch.Generator(device).manual_seed(seed)
        self.matrix = torch.randn(m, n, generator=generator, device=device, dtype=dtype)
        self.index = clustered_indices(m, n, DENSITY, seed, device)
        self.new = neighbour(self.index, m * n)
        self.values = ops.packed_gather(self.matrix, self.index, backend="reference").neg_()

    def packed_gather(self, backend: str | None) -> Tensor:
        return ops.packed_gather(self.matrix, self.index, backend=backend)

    def packed_scatter_(self, backend: str | None) -> Tensor:
        return ops.packed_scatter_(self.matrix, self.index, self.values, backend=backend)

    def packed_migrate(self, backend: str | None) -> Tensor:
        return ops.packed_migrate(self.values, self.index, self.new, backend=backend)

    def moved(self, op: str) -> float:
        k, width = len(self.index), self.matrix.element_size()
        lines = Arena.of([self.index]).line_bytes(width)
        return {
            "packed_gather": lines + k * (4 + width),
            "packed_scatter_": 2 * lines + k * (4 + width),
            "packed_migrate": (k + len(self.new)) * (4 + width),
        }[op]


def backends(run: Run) -> list[str]:
    """Those that support the device, torch's own indexing (the reference) first."""
    names = ["reference", "native-cpu"] if run.dry else ["reference", "triton", "native-cuda"]
    found = dispatch.backends()
    for name in names:
        if not found[name].usable:
            run.add(f"{name}: all packed ops", status=f"not usable: {found[name].reason}"[:300])
    return [name for name in names if found[name].usable]


def problem_of(case: Case, op: str, backend: str) -> str:
    """What is wrong with results and matrices. The matrix is put back."""
    saved, results = case.matrix.clone(), []
    for name in ("reference", backend):
        results.append([getattr(case, op)(name).clone(), case.matrix.clone()])
        case.matrix.copy_(saved)
    return timing.difference(*results)


def one_matrix(run: Run) -> None:
    m, n = LLAMA_2_7B.on(run.device).layer[4]
    usable = backends(run)
    for dtype in (BF16, FP32):
        cases = [Case(m, n, dtype, seed, run.device) for seed in range(run.sets(m * n * dtype.itemsize))]
        for op in ("packed_gather", "packed_scatter_", "packed_migrate"):
            against = None
            for backend in usable:
                problem = run.problem(lambda op=op, b=backend, c=cases[0]: problem_of(c, op, b))
                calls = [partial(getattr(case, op), backend) for case in cases]
                taken = run.time(
                    f"{op}, {backend}",
                    calls,
                    problem=problem,
                    moved=cases[0].moved(op),
                    against=against,
                    op=op,
                    backend=backend,
                    dtype=dtype_name(dtype),
                    shape=f"{m} x {n}",
                )
                if backend == "reference" and taken is not None:
                    against = (f"{op}, reference", taken)
        del cases
        run.free()


def norms(run: Run) -> None:
    """packed_l2_norm over packed fp32 gradients of a model and dense bf16 ones of a layer."""
    model = LLAMA_2_7B.on(run.device)
    for packed, layers in ((True, model.layers), (False, 1)):
        arena = model.arena(run.device, layers)
        if packed:
            grads = [torch.randn(count, device=run.device) for count in arena.counts]
            moved = 4.0 * arena.entries
        else:
            grads = model.matrices(run.device, BF16, 1e-3, layers)
            moved = arena.line_bytes(2) + 4.0 * arena.entries

        def norm(backend: str | None = None, grads=grads, arena=arena, packed=packed) -> Tensor:
            return ops.packed_l2_norm(
                grads, arena.indices, arena.offsets, arena.counts, packed_grads=packed, backend=backend
            )

        problem = run.problem(lambda norm=norm: timing.difference([norm("reference")], [norm()]))
        dtype = dtype_name(grads[0].dtype)
        run.time(
            f"{'packed' if packed else 'dense'} {dtype} gradients",
            norm,
            problem=problem,
            moved=moved,
            op="packed_l2_norm",
            model=model.name,
            dtype=dtype,
            shape=f"{len(grads)} matrices",
        )


def migrations(run: Run) -> None:
    """One fp32 moment of every matrix carried over to lists that share 95 %.

    It goes matrix by matrix, for which the host takes longer than the card. So the row times the
    host and has no roofline. A refresh takes `arena_migrate_`.
    """
    model = LLAMA_2_7B.on(run.device)
    old = model.masks(run.device)
    new = [neighbour(index, m * n) for index, (m, n) in zip(old, model.layer * model.layers)]
    values = [torch.randn(len(index), device=run.device) for index in old]

    def migrate(backend: str | None = None) -> list[Tensor]:
        return [ops.packed_migrate(*lists, backend=backend) for lists in zip(values, old, new)]

    problem = run.problem(lambda: timing.difference(migrate("reference"), migrate()))
    run.time(
        "a moment of all matrices, 95 % stay",
        migrate,
        problem=problem,
        op="packed_migrate",
        model=model.name,
        dtype="fp32",
        shape=f"{len(old)} matrices",
    )


class Refresh:
    """All matrices of a model in one arena that goes to new lists and back, call by call."""

    def __init__(self, run: Run):
        self.model = LLAMA_2_7B.on(run.device)
        shapes = self.model.layer * self.model.layers
        old = self.model.masks(run.device)
        new = [neighbour(index, m * n)[: len(index)] for index, (m, n) in zip(old, shapes)]
        self.lists, self.at, self.arena = (old, new), 0, Arena.of(old)
        self.counts = list(map(len, old))
        self.state = [torch.randn(len(self.arena.indices), device=run.device) for _ in range(3)]
        self.weights = self.model.matrices(run.device, BF16, 1e-2, self.model.layers)
        self.steps = torch.ones(len(old), device=run.device)

    def migrate(self, backend: str | None = None) -> list[Tensor]:
        self.at = 1 - self.at
        arena, new = self.arena, self.lists[self.at]
        counts, self.counts = self.counts, list(map(len, new))
        arguments = self.weights, new, arena.indices, arena.offsets, counts, *self.state[:2], self.steps
        return [ops.arena_migrate_(*arguments, master=self.state[2], backend=backend)]

    def problem(self) -> str:
        """Where the op and the reference part on the way there. Then it goes back."""
        saved, results = [x.clone() for x in (self.arena.indices, *self.state)], []
        for backend in ("reference", None):
            kept = self.migrate(backend)
            results.append([*kept, *(x.clone() for x in (self.arena.indices, *self.state))])
            self.at, self.counts = 0, list(map(len, self.lists[0]))
            for x, y in zip((self.arena.indices, *self.state), saved):
                x.copy_(y)
        return timing.difference(*results)

    def moved(self) -> float:
        """Bytes of old and new lists, the written lists, and three arenas read and written."""
        old, new = (sum(map(len, lists)) for lists in self.lists)
        return 4.0 * (old + 2 * new + 3 * (old + new))


def refreshes(run: Run) -> None:
    """arena_migrate_ on every matrix of a model at once, with fp32 moments and masters."""
    case = Refresh(run)
    run.time(
        "list, moments and masters of all matrices, 95 % stay",
        case.migrate,
        problem=run.problem(case.problem),
        moved=case.moved(),
        op="arena_migrate_",
        model=case.model.name,
        dtype="fp32",
        shape=f"{len(case.weights)} matrices",
    )


def work(run: Run) -> None:
    one_matrix(run)
    norms(run)
    run.free()
    migrations(run)
    run.free()
    refreshes(run)
