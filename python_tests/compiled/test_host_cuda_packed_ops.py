"""The CUDA device code, compiled by the host compiler and run on the host.

``host_cuda/shim.h`` stands in for the CUDA built-ins and runs one host thread per CUDA thread. nvcc
compiles the same headers; nothing is copied.
"""

import ctypes

import pytest
import torch
from helpers.host_cuda import HOST_CUDA, address, compiled, library, run, size

from lift_kernels.ops import reference

HARNESS = r"""
#include "shim.h"
#include "packed_ops.cuh"

using shim::launch;

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
    """The packed kernels in a shared library, which traps on undefined behaviour."""
    folder = tmp_path_factory.mktemp("host_cuda")
    (folder / "harness.cpp").write_text(HARNESS)
    return library(folder / "harness.cpp", folder)


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


SUMS = [sum(range(128)), sum(range(128, 256)), sum(range(256, 300))]


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_shim_runs_blocks_with_shuffles_and_shared_memory(tmp_path, sanitizer):
    done = run(compiled(HOST_CUDA / "block_sum.cpp", tmp_path / "sums", f"-fsanitize={sanitizer}"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(map(int, done.stdout.split())) == SUMS and done.stderr == ""


def test_shim_shows_a_missing_barrier_as_a_race(tmp_path):
    done = run(compiled(HOST_CUDA / "block_sum.cpp", tmp_path / "race", "-fsanitize=thread", "-DDROP_BARRIER"))
    assert done.returncode != 0 and "data race" in done.stderr and "block_sum_kernel" in done.stderr


SHUFFLES = r"""
#include "shim.h"

extern "C" void shuffles(int* out) {  // 40 threads: a warp and a quarter
  shim::launch(1, 40, [&] {
    const int value = 100 + int(threadIdx.x);
    int* own = out + 4 * threadIdx.x;
    const bool whole = threadIdx.x < 32;
    own[0] = __shfl_xor_sync(~0u, value, 5);
    own[1] = __shfl_up_sync(~0u, value, 3);
    own[2] = whole ? __shfl_down_sync(~0u, value, 3) : 0;
    own[3] = __shfl_sync(~0u, value, 2);
  });
}
"""


def test_shim_shuffles(tmp_path):
    (tmp_path / "shuffles.cpp").write_text(SHUFFLES)
    library = ctypes.CDLL(str(compiled(tmp_path / "shuffles.cpp", tmp_path / "shuffles.so", "-shared", "-fPIC")))
    out = torch.zeros(40, 4, dtype=torch.int32)
    library.shuffles(address(out))
    lanes = torch.arange(40) % 32
    first = torch.arange(40) - lanes + 100
    full = slice(0, 32)
    assert torch.equal(out[:, 0].long(), first + (lanes ^ 5))
    assert torch.equal(out[:, 1].long(), first + torch.where(lanes < 3, lanes, lanes - 3))
    assert torch.equal(
        out[full, 2].long(), first[full] + torch.where(lanes[full] + 3 < 32, lanes[full] + 3, lanes[full])
    )
    assert torch.equal(out[:, 3].long(), first + 2)


EARLY = r"""
#include "shim.h"

void rotate_kernel(int* out) {  // odd threads are off; the others pass their numbers round, twice
  __shared__ int values[64];
  const unsigned t = threadIdx.x;
  if (t % 2 == 1) return;
  values[t] = int(t);
  for (int turn = 0; turn < 2; ++turn) {
    __syncthreads();
    const int next = values[(t + 2) % 64];
    __syncthreads();
    values[t] = next;
  }
  out[t / 2] = values[t];
}

int main() {
  int out[32] = {};
  shim::launch(1, 64, [&] { rotate_kernel(out); });
  for (const int value : out) std::printf("%d ", value);
}
"""


@pytest.mark.parametrize("flag", ["-fsanitize=thread", "-DSHIM_FIBERS"])
def test_shim_threads_that_return_early_leave_their_barriers(tmp_path, flag):
    (tmp_path / "early.cpp").write_text(EARLY)
    done = run(compiled(tmp_path / "early.cpp", tmp_path / "early", flag))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(map(int, done.stdout.split())) == [(t + 4) % 64 for t in range(0, 64, 2)]
