"""The machine's own rate of scattered cache lines: the resource that limits a sparse step.

A step must visit each line that holds a trained entry. Lines of dense gradients are read, lines of
weights are read and written. Here the same lines of tensors of the same size are visited and
nothing is computed, by a small C++ loop with prefetches. A step can't be faster than that.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.common.arenas import LINE, Arena

SOURCE = Path(__file__).with_suffix(".cpp")


@functools.cache
def _visit() -> Callable | None:
    """The compiled loop, or None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "scattered_lines.so"
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", SOURCE, "-o", library], check=True)
        visit = ctypes.CDLL(str(library)).visit_lines
    visit.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    visit.restype = ctypes.c_float
    return visit


class ScatteredLines:
    """Visits the lines of a step, with all threads of torch.

    Attributes:
        count: lines of weights, and of dense gradients if there are any.
        tensors: in place of the weights, which must stay what they are.
    """

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor] | None, arena: Arena):
        lines = [lines_of(index, w.element_size()) for index, w in zip(arena.lists(), weights)]
        self.tensors = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
        jobs = [(w.data_ptr(), line.ctypes.data, len(line), 1) for w, line in zip(self.tensors, lines)]
        read: list[np.ndarray] = []
        if grads is not None:
            read = [lines_of(index, g.element_size()) for index, g in zip(arena.lists(), grads)]
            jobs += [(g.data_ptr(), line.ctypes.data, len(line), 0) for g, line in zip(grads, read)]
        self._kept = lines, read, grads  # The jobs hold their addresses.
        self.count = sum(job[2] for job in jobs)
        threads = torch.get_num_threads()
        self._shares = balanced(jobs, threads)
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self) -> None:
        visit = _visit()
        assert visit is not None

        def all_of(jobs):
            for job in jobs:
                visit(*job)  # without the interpreter's lock

        list(self._pool.map(all_of, self._shares))


def usable() -> bool:
    """Whether there is a C++ compiler."""
    return _visit() is not None


def lines_of(index: Tensor, width: int) -> np.ndarray:
    """Numbers of the distinct lines that hold these sorted positions."""
    return np.unique(index.cpu().numpy() // (LINE // width)).astype(np.int32)


def balanced(jobs: Sequence[tuple], threads: int) -> list[list[tuple]]:
    """The jobs by thread. Long ones are cut, so that all threads have as many lines."""
    size = max(1, sum(job[2] for job in jobs) // (16 * threads))
    parts = [
        (base, lines + 4 * at, min(size, count - at), write)
        for base, lines, count, write in jobs
        for at in range(0, count, size)
    ]
    return [parts[number::threads] for number in range(threads)]
