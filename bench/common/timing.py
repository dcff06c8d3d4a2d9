"""Interleaved timing in one process, rates of the machine, comparison of results.

Other work on a machine, its clock and its caches drift. So candidates are timed in turns, in a new
random order each round. The caches are emptied before each run. Candidates are compared by the
median of the ratios within a round.

The machine is described by its copy bandwidth (bytes read + bytes written over time), measured in
the same rounds where one bench times an op. For training steps the measured rate of matrix products
joins it. The roofline of a row is the time in which an op would move its bytes at that bandwidth,
or do its FLOPs and move its bytes. Each bench says how it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Candidate:
    """Something to time. ``roofline_bytes``: what it must move at least, or None."""

    name: str
    run: Callable[[], object]
    roofline_bytes: float | None = None


def time_interleaved(
    candidates: Sequence[Candidate], runs: int, warmup: int = 2, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Seconds of every run of every candidate, by name.

    There are ``runs`` rounds. Each has a random order, and the caches are emptied before each run.
    On a GPU each run is waited for.
    """
    # 96 MiB. Reading them leaves nothing else in the caches and nothing to write back.
    evict = torch.ones(24 * 2**20, device=device)
    wait = torch.cuda.synchronize if evict.is_cuda else lambda: None
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for round_ in range(-warmup, runs):
        for i in rng.permutation(len(candidates)):
            evict.sum()
            wait()
            start = time.perf_counter()
            candidates[i].run()
            wait()
            elapsed = time.perf_counter() - start
            if round_ >= 0:
                times[candidates[i].name].append(elapsed)
    return {name: np.array(values) for name, values in times.items()}


def time_interleaved_with_copy(
    candidates: Sequence[Candidate], runs: int, warmup: int = 2, device: str = "cpu", mib: int = 256
) -> tuple[dict[str, np.ndarray], float]:
    """`time_interleaved`, and the median copy bandwidth of the same rounds.

    The bandwidth of a shared CPU changes by the second. A GPU's is measured by itself.
    """
    if device != "cpu":
        return time_interleaved(candidates, runs, warmup, device), copy_bandwidth(device, mib)
    values = torch.ones(mib * 2**18)
    times = time_interleaved([*candidates, Candidate("copy", lambda: values.mul_(1.0))], runs, warmup)
    return times, 2 * values.nbytes / float(np.median(times.pop("copy")))


def copy_bandwidth(device: str = "cpu", mib: int = 256, runs: int = 15) -> float:
    """Bytes per second of a large copy onto itself, the best of ``runs``.

    It reads, scales and writes back. Reads and writes are counted. The copy is in place because a
    copy to another place also reads the lines that it overwrites, and nobody counts those.
    """
    values = torch.ones(mib * 2**18, device=device)
    seconds = min(float(t) for t in timed(lambda: values.mul_(1.0), device, runs))
    return 2 * values.nbytes / seconds


def product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, runs: int = 7) -> float:
    """FLOPs per second of a product of two ``size`` x ``size`` matrices, the best of ``runs``."""
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(float(t) for t in timed(lambda: left @ right, device, runs))


def timed(run: Callable[[], object], device: str, runs: int, warmup: int = 2) -> np.ndarray:
    """Seconds of each of ``runs`` calls in a row, by CUDA events on a GPU."""
    times = []
    for _ in range(warmup + runs):
        if device == "cpu":
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        else:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / 1e3)
    return np.array(times[warmup:])


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> str:
    """What is wrong with the results of a candidate, or an empty string.

    fp32 results may differ by 1e-6 of the largest entry. bf16 and fp16 results, and codes, may
    differ by one unit in the last place in one entry of a thousand.
    """
    for i, (right, got) in enumerate(zip(expected, actual)):
        gap = (right.double() - got.double()).abs()
        largest = float(right.abs().max())
        if right.dtype.itemsize <= 2:
            is_code = not right.dtype.is_floating_point
            unit = torch.ones_like(gap) if is_code else right.double().abs() * torch.finfo(right.dtype).eps + 1e-30
            same = bool((gap <= unit).all()) and float((gap > 0).double().mean()) <= 1e-3
        else:
            same = float(gap.max()) <= 1e-6 * largest
        if not same or right.shape != got.shape:
            return (
                f"result {i} differs by up to {float(gap.max()):.3g} from the reference (largest entry {largest:.3g})"
            )
    return ""
