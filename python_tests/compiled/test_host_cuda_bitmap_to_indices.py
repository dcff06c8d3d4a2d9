"""The device code of `bitmap_to_indices`, run on the host.

The tests check results, races and accesses out of bounds. They also leave out each barrier in turn.
"""

from __future__ import annotations

import re
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.bitmap_cases import CASES, random_keys, selection
from helpers.bits import HANG_S
from helpers.host_cuda import HOST_CUDA, ROOT, address, compiled, library, numbers

from lift_kernels.ops import cuda

pytestmark = pytest.mark.slow
SOURCE = ROOT / "csrc" / "cuda" / "bitmap_to_indices.cuh"
BARRIERS = len(re.findall(r"__syncthreads\(\)", SOURCE.read_text()))


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A file with all cases."""
    file = tmp_path_factory.mktemp("bitmap_to_indices") / "calls"
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
    """The program, compiled with ThreadSanitizer."""
    return compiled(
        HOST_CUDA / "bitmap_to_indices.cpp", tmp_path_factory.mktemp("race") / "program", "-fsanitize=thread"
    )


def run(program, calls, *barrier):
    """The finished process, and the numbers that it wrote."""
    output = calls.with_name("results")
    command = [program, calls, output, *map(str, barrier)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_S, env={"TSAN_OPTIONS": "halt_on_error=1"}
    )
    return done, torch.from_numpy(np.fromfile(output, dtype=np.int32))


def check(done, found):
    """Check that every case is equal to the bit."""
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    assert found[0] == 199 * 5, "the last of 200 tiles of 5"
    found = found[1:]
    for name, case in CASES.items():
        call = case()
        for label, expected in (("indices", call.indices), ("thresholds", call.thresholds), ("status", call.status)):
            result, found = found[: expected.numel()].view(expected.shape), found[expected.numel() :]
            assert torch.equal(result, expected), f"{name}: {label}"
    assert len(found) == 0


@pytest.fixture
def on_host(tmp_path_factory, monkeypatch):
    """Run on CPU tensors what `ops.cuda` launches on a GPU, with the same blocks."""
    host = library(HOST_CUDA / "bitmap_to_indices.cpp", tmp_path_factory.mktemp("bitmap_to_indices"), "-DSHIM_FIBERS")

    def launch(bitmaps, candidates, counts, columns, totals, indices, thresholds, status):
        words = -(-bitmaps[0].numel() // cuda._TILE_WORDS) if len(bitmaps) else 0
        assert totals.numel() == len(bitmaps) * words
        host.bitmap_to_indices(
            address(bitmaps),
            *numbers(*bitmaps.shape[:2], columns),
            address(candidates),
            *numbers(candidates.shape[1]),
            address(counts),
            *numbers(indices.shape[1]),
            *map(address, (totals, indices, thresholds, status)),
        )

    monkeypatch.setattr(cuda, "native", SimpleNamespace(bitmap_to_indices=SimpleNamespace(default=launch)))


def test_cuda_bitmap_through_the_launcher(on_host):
    """All cases run with the blocks of a GPU, and so does a matrix of several tiles.

    No tensor of the caller is changed.
    """
    large = selection(random_keys(2, 131, 1025), 50000, 2**30, 2**30 + 2**29)
    for name, call in [*((name, case()) for name, case in CASES.items()), ("several tiles", large)]:
        arguments = call.arguments()
        before = [x.clone() for x in arguments[:3]]
        indices, thresholds, status = cuda.bitmap_to_indices(*arguments)
        assert torch.equal(indices, call.indices) and torch.equal(status, call.status), name
        assert torch.equal(thresholds.view(torch.int32), call.thresholds), name
        assert all(torch.equal(x, y) for x, y in zip(arguments[:3], before)), name


@pytest.mark.parametrize("flag", ["-DSHIM_FIBERS", "-fsanitize=address,undefined"])
def test_cuda_bitmap(tmp_path, calls, flag):
    check(*run(compiled(HOST_CUDA / "bitmap_to_indices.cpp", tmp_path / "program", flag), calls))


def test_cuda_bitmap_has_no_race(raced, calls):
    check(*run(raced, calls))


@pytest.mark.parametrize("barrier", range(BARRIERS))
def test_cuda_bitmap_needs_each_barrier(raced, calls, barrier):
    """Without the barrier two threads meet in shared memory, and ThreadSanitizer reports them."""
    done, _ = run(raced, calls, barrier)
    assert done.returncode != 0 and "data race" in done.stderr and "bitmap_" in done.stderr, done.stderr[-2000:]


def test_cuda_bitmap_has_no_further_barrier(raced, calls):
    assert run(raced, calls, BARRIERS)[0].returncode == 3
