// A test kernel for shim.h: a sum over a thread block with shuffles and shared memory. Without its
// barrier it has a data race.
#include "shim.h"

#include <cstdio>

namespace {

constexpr unsigned kThreads = 128, kWarps = kThreads / shim::kWarp;

__global__ void block_sum_kernel(const int* values, int n, int* sums) {
  __shared__ int partial[kWarps];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  int sum = i < unsigned(n) ? values[i] : 0;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % shim::kWarp == 0) partial[threadIdx.x / shim::kWarp] = sum;
#ifndef DROP_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x != 0) return;
  int total = 0;
  for (unsigned w = 0; w < kWarps; ++w) total += partial[w];
  sums[blockIdx.x] = total;
}

}  // namespace

int main() {
  constexpr int n = 300;
  int values[n], sums[3] = {};
  for (int i = 0; i < n; ++i) values[i] = i;
  shim::launch(3, kThreads, [&] { block_sum_kernel(values, n, sums); });
  std::printf("%d %d %d\n", sums[0], sums[1], sums[2]);
}
