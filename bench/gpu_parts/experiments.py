"""Settings that may be faster than those in use. A part of its own, outside of the timings.

    python bench/gpu_suite.py --part experiments --out FOLDER

Each row is one setting, against what is in use. ``prediction`` is what reading the machine code
made expect before any card had tried it, or what an H100 said of an earlier form. Every setting is
checked before it is timed, and put back afterwards. In the dry run settings are named and ignored.

- The step of LLaMA-2-7B from dense gradients: bytes that the card fetches for a sector that is read
  (cudaLimitMaxL2FetchGranularity; ``in_effect`` says what the card took), and warps of a program.
- The selection: depth of a step of the product, and stages of its pipeline.
- The fused weight gradient: tiles, tokens of a step, stages, warps, and the order of tiles.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from bench.common.steps import SparseStep
from bench.gpu_parts.masks import rank_of, selection_problem
from bench.gpu_parts.models import BF16, DENSITY, LLAMA_2_7B
from bench.gpu_parts.runner import Run
from bench.gpu_parts.step import labels_of, last_layer_problem
from bench.gpu_parts.weight_grads import Problem
from lift_kernels import ops

FETCH_LIMIT = 5  # cudaLimitMaxL2FetchGranularity
Setting = tuple[str, str, Callable[[], AbstractContextManager]]
"""Name, prediction, and what puts the setting in place for a while."""


def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libcudart" in line}
    if not paths:
        raise RuntimeError("torch has loaded no libcudart")
    return ctypes.CDLL(sorted(paths)[0])


@contextmanager
def fetch_granularity(size: int) -> Iterator[dict]:
    """Let the card fetch this many bytes for a sector. Yields a column: what it took."""
    runtime, before, now = cuda_runtime(), ctypes.c_size_t(), ctypes.c_size_t()
    runtime.cudaDeviceGetLimit(ctypes.byref(before), FETCH_LIMIT)
    runtime.cudaDeviceSetLimit(FETCH_LIMIT, ctypes.c_size_t(size))
    try:
        runtime.cudaDeviceGetLimit(ctypes.byref(now), FETCH_LIMIT)
        yield {"in_effect": now.value}
    finally:
        runtime.cudaDeviceSetLimit(FETCH_LIMIT, before)


class WithOptions:
    """A Triton kernel that is always launched with these options."""

    def __init__(self, kernel: Any, **options: object):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **given: self.kernel[grid](*arguments, **given | self.options)


def compare(run: Run, settings: list[Setting], make: Callable[[], dict], **labels: object) -> None:
    """A row for each setting, the first of which is what is in use.

    ``make``: the arguments of `Run.time` under a setting, with the check of its result.
    """
    against = None
    for name, prediction, setting in settings:
        try:
            with nullcontext() if run.dry else setting() as columns:
                columns = columns if isinstance(columns, dict) else {}
                taken = run.time(name, **make(), against=against, prediction=prediction, **labels, **columns)
        except Exception as error:  # what is tried next goes on
            run.add(name, **labels, prediction=prediction, status=f"failed: {error}"[:300])
            continue
        against = against or (None if taken is None else (name, taken))


def step(run: Run) -> None:
    model = LLAMA_2_7B.on(run.device)
    layers = min(model.layers, 8)
    weights, grads = (model.matrices(run.device, BF16, scale, layers) for scale in (0.02, 1e-3))
    arena, options = model.arena(run.device, layers), {"master": True}

    def warps(number: int) -> AbstractContextManager:
        from lift_kernels.ops.triton import sparse_adamw

        kernel = WithOptions(sparse_adamw._sparse_adamw_kernel, num_warps=number)
        return mock.patch.object(sparse_adamw, "_sparse_adamw_kernel", kernel)

    def make() -> dict:
        sparse = SparseStep(weights, grads, arena, **options)
        problem = run.problem(lambda: last_layer_problem(sparse, grads, len(model.layer), options))
        return {"calls": sparse, "problem": problem, "moved": sparse.roofline_bytes()}

    fetch = "5-12 % less than with 64 bytes, of which half serve nothing"
    settings: list[Setting] = [("step, as it is", "", nullcontext)]
    for size, prediction in ((32, fetch), (64, "as it is: cards fetch 64 bytes by default"), (128, "slower")):
        settings.append((f"step, fetches of {size} bytes", prediction, partial(fetch_granularity, size)))
    settings += [(f"step, {number} warps", "no difference with masters", partial(warps, number)) for number in (4, 8)]
    compare(run, settings, make, **labels_of(model, layers, BF16))


def launch_options(module: ModuleType, function: str, **changes: object) -> AbstractContextManager:
    """Let a launcher take other options than those that ``function`` gives it for the card."""
    given = getattr(module, function)
    return mock.patch.object(module, function, lambda *card, **case: given(*card, **case) | changes)


def selection(run: Run) -> None:
    model = LLAMA_2_7B.on(run.device)
    (m, n), rank = model.layer[-1], rank_of(model)
    generator, k = torch.Generator(run.device).manual_seed(0), round(DENSITY * m * n)
    left, right = (torch.randn(side, rank, generator=generator, device=run.device) for side in (m, n))

    def tile(depth: int, stages: int) -> AbstractContextManager:
        from lift_kernels.ops.triton import lowrank_topk

        return launch_options(lowrank_topk, "lowrank_options", DEPTH=depth, num_stages=stages)

    def make() -> dict:
        problem = run.problem(lambda: selection_problem(left, right, k, ops.lowrank_topk(left, right, k)))
        calls = partial(ops.lowrank_topk, left, right, k)
        return {"calls": calls, "problem": problem, "waits": True, "flops": 2.0 * m * n * rank, "rate": "tf32"}

    settings: list[Setting] = [("selection, as it is", "", nullcontext)]
    for depth in (16, 32):
        for stages in (2, 3, 4):
            one = "slower, one buffer" if stages == 2 else "17 % slower, as on an H100"
            prediction = one if stages == 2 or depth == 16 else "as it is" if stages == 3 else "no difference"
            settings.append((f"selection, depth {depth}, {stages} stages", prediction, partial(tile, depth, stages)))
    shape = f"{m} x {n}, r = {rank}, k = {k}"
    compare(run, settings, make, op="lowrank_topk", model=model.name, dtype="fp32", shape=shape)


WHOLE_COLUMNS = 2**15  # tiles: more than any matrix here has
TILES = {  # rows, columns, tokens, warps, stages, tiles of a band
    (256, 64, 64, 8, 3, 16): "as it is with Triton 3.6",
    (128, 128, 32, 8, 4, 16): "as it is with Triton 3.7, spills with 3.6",
    (128, 128, 32, 8, 4, 8): "2 % slower with Triton 3.7",
    (128, 128, 32, 8, 4, WHOLE_COLUMNS): "up to 8 % slower: grad_output is read for each column of tiles",
    (128, 128, 32, 8, 3, 16): "2 % slower than 4 stages with Triton 3.7, 18 % with 3.6",
    (128, 128, 64, 8, 3, 16): "no difference to 32 tokens and 4 stages",
    (128, 64, 64, 8, 3, 16): "30 % slower: it reads a third more",
    (128, 64, 32, 8, 3, 16): "twice as slow",
}


def weight_gradient(run: Run) -> None:
    model = LLAMA_2_7B.on(run.device)
    given = Problem(run, model, 2048 // 64 if run.dry else 2048)

    def tile(rows: int, columns: int, tokens: int, warps: int, stages: int, band: int) -> AbstractContextManager:
        from lift_kernels.ops.triton import packed_weight_grad

        sides = {"ROWS": rows, "COLUMNS": columns, "TOKENS": tokens, "BAND": band}
        return launch_options(packed_weight_grad, "weight_grad_options", num_warps=warps, num_stages=stages, **sides)

    def call() -> list[torch.Tensor]:
        options = {} if run.dry else {"fused": True}
        return [ops.packed_weight_grad(*pair, index, **options) for pair, index in zip(given.factors, given.lists)]

    def make() -> dict:
        return {"calls": call, "problem": run.problem(lambda: given.wrong(call())), "flops": given.flops}

    # At commit 9db6b77, without bands, an H200 took 4.8 ms. Torch multiplies for 1.1 ms.
    prediction = "on an H200 2.4 ms with Triton 3.6 and 1.6 with 3.7"
    settings: list[Setting] = [("fused product, as it is", prediction, nullcontext)]
    for sizes, prediction in TILES.items():
        rows, columns, tokens, warps, stages, band = sizes
        order = "whole columns" if band == WHOLE_COLUMNS else f"bands of {band}"
        name = f"fused product, {rows} x {columns} x {tokens}, {warps} warps, {stages} stages, {order}"
        settings.append((name, prediction, partial(tile, *sizes)))
    compare(run, settings, make, **given.labels("packed_weight_grad"))


def work(run: Run) -> None:
    for part in (step, selection, weight_gradient):
        part(run)
        run.free()
