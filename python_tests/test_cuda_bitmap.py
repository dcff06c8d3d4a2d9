"""The device code of `bitmap_to_indices` on the host: results, races, accesses out of bounds, and each barrier left out in turn."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
import torch
from bitmap_cases import CASES
from test_cuda_on_host import HOST_CUDA, ROOT, compiled

SOURCE = ROOT / "csrc" / "cuda" / "bitmap.cuh"
BARRIERS = len(re.findall(r"__syncthreads\(\)", SOURCE.read_text()))


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """All cases in a file."""
    file = tmp_path_factory.mktemp("bitmap") / "calls"
    with file.open("wb") as out:
        for case in CASES.values():
            call = case()
            sizes = [*call.bitmaps.shape[:2], call.columns, call.candidates.shape[1], call.k]
            out.write(np.array(sizes, dtype=np.int64).tobytes())
            for tensor in (call.bitmaps, call.candidates, call.counts):
                out.write(tensor.numpy().tobytes())
    return file


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    """The program under ThreadSanitizer."""
    return compiled(HOST_CUDA / "bitmap.cpp", tmp_path_factory.mktemp("race") / "program", "-fsanitize=thread")


def run(program, calls, *barrier):
    """The finished process and the numbers that it wrote."""
    output = calls.with_name("results")
    command = [program, calls, output, *map(str, barrier)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"TSAN_OPTIONS": "halt_on_error=1"})
    return done, torch.from_numpy(np.fromfile(output, dtype=np.int32))


def check(done, numbers):
    """Equal to the bit in every case."""
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert numbers[0] == 199 * 5, "the last of 200 tiles of 5"
    numbers = numbers[1:]
    for name, case in CASES.items():
        call = case()
        for label, expected in (("indices", call.indices), ("thresholds", call.thresholds), ("status", call.status)):
            found, numbers = numbers[: expected.numel()].view(expected.shape), numbers[expected.numel() :]
            assert torch.equal(found, expected), f"{name}: {label}"
    assert len(numbers) == 0


@pytest.mark.parametrize("flag", ["-DSHIM_FIBERS", "-fsanitize=address,undefined"])
def test_cuda_bitmap(tmp_path, calls, flag):
    check(*run(compiled(HOST_CUDA / "bitmap.cpp", tmp_path / "program", flag), calls))


def test_cuda_bitmap_has_no_race(raced, calls):
    check(*run(raced, calls))


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_cuda_bitmap_needs_each_barrier(raced, calls, barrier):
    """Without it two threads meet in shared memory, and ThreadSanitizer sees them."""
    done, _ = run(raced, calls, barrier)
    assert done.returncode != 0 and "data race" in done.stderr and "bitmap_" in done.stderr, done.stderr[-2000:]


def test_cuda_bitmap_has_no_further_barrier(raced, calls):
    assert run(raced, calls, BARRIERS)[0].returncode == 3
