"""The CUDA device code, compiled by the host compiler against a minimal stand-in for the CUDA built-ins, and run for real.

The kernels here are grid-stride loops without shared memory or barriers, so running their threads one after the other is
faithful. The same header is what nvcc compiles; nothing is copied.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lift_kernels import reference

ROOT = Path(__file__).parent.parent

HARNESS = r"""
#include <cstdint>
struct Dim { unsigned x; };
static thread_local Dim threadIdx, blockIdx, blockDim, gridDim;
#define __global__
#define __restrict__
#include "packed.cuh"

template <class F> void launch(unsigned blocks, unsigned threads, F body) {
  gridDim.x = blocks; blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) body();
}

extern "C" void gather(const float* s, const int32_t* i, int64_t k, float* o, unsigned blocks) {
  launch(blocks, 64, [&] { lift::cuda::packed_gather_kernel(s, i, k, o); });
}
extern "C" void scatter(float* d, const int32_t* i, int64_t k, const float* v, unsigned blocks) {
  launch(blocks, 64, [&] { lift::cuda::packed_scatter_kernel(d, i, k, v); });
}
extern "C" void migrate(const uint32_t* v, const int32_t* o, int64_t ko, const int32_t* n, int64_t kn, uint32_t* out,
                        unsigned blocks) {
  launch(blocks, 64, [&] { lift::cuda::packed_migrate_kernel(v, o, ko, n, kn, out); });
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The header compiled into a shared library, under the undefined-behaviour sanitizer's traps."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "a C++ compiler is needed to run the CUDA device code on the host"
    folder = tmp_path_factory.mktemp("host_cuda")
    (folder / "harness.cpp").write_text(HARNESS)
    library = folder / "harness.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc/cuda'}", "harness.cpp", "-o", library], cwd=folder, check=True)
    return ctypes.CDLL(str(library))


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def size(tensor):
    return ctypes.c_int64(tensor.numel())


def lists(count, numel, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:count].sort().values.int()


@pytest.mark.parametrize("blocks", [1, 3, 40])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 1000])
def test_packed_gather_and_scatter(kernels, count, blocks):
    source, indices = torch.randn(2000), lists(count, 2000, seed=count)
    out = torch.full((count + 1,), float("nan"))
    kernels.gather(address(source), address(indices), size(indices), address(out), blocks)
    assert torch.equal(out[:count], reference.packed_gather_ref(source, indices)) and out[count].isnan()

    dest, values = torch.randn(2000), torch.randn(count)
    expected = dest.clone()
    reference.packed_scatter_ref(expected, indices, values)
    kernels.scatter(address(dest), address(indices), size(indices), address(values), blocks)
    assert torch.equal(dest, expected)


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("old_count, new_count", [(0, 5), (5, 0), (1, 1), (700, 650), (1000, 1000)])
def test_packed_migrate(kernels, old_count, new_count, blocks):
    old, new = lists(old_count, 1000, seed=1), lists(new_count, 1000, seed=2)
    values = torch.randn(old_count)
    out = torch.zeros(new_count)
    kernels.migrate(address(values), address(old), size(old), address(new), size(new), address(out), blocks)
    assert torch.equal(out, reference.packed_migrate_ref(values, old, new))
