// Launches of the subspace-iteration ops: Gaussian sketch, Gram matrix, factorization, and product
// with the inverse factor.
#include "subspace_ops.cuh"

#include "launch.h"
#include "gaussian_sketch.cuh"

namespace lift {
namespace {

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

int gaussian_sketch_cuda(void* out, DType dtype, int64_t matrices, int64_t count, uint64_t seed, uint64_t first,
                         DeviceStream stream) {
  if (matrices * count == 0) return 0;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    const unsigned blocks = blocks_for(matrices * ceil_div(count, 16 / int64_t(sizeof(T))));
    cuda::gaussian_sketch_kernel<<<blocks, kThreads, 0, cuda_stream(stream)>>>(static_cast<T*>(out), matrices, count,
                                                                               seed, first);
  };
  if (dtype == DType::f32) launch(float{});
  else launch(__nv_bfloat16{});
  return int(cudaGetLastError());
}

int gram_cuda(const float* product, const float* block, const float* previous, const float* edge, float* raised,
              int64_t batch, int64_t rows, int64_t l, int64_t slab_rows, float* partials, DeviceStream stream) {
  const auto launch = [&](auto kernel, int64_t tile) {
    const int64_t tiles = ceil_div(l, tile);
    const dim3 grid(unsigned(batch * (tiles * (tiles + 1) / 2)), unsigned(ceil_div(rows, slab_rows)));
    kernel<<<grid, cuda::kQrThreads, 0, cuda_stream(stream)>>>(product, block, previous, edge, raised, rows, int(l),
                                                               slab_rows, partials);
  };
  if (l <= cuda::kNarrowTile) launch(cuda::gram_kernel<cuda::kNarrowTile>, cuda::kNarrowTile);
  else launch(cuda::gram_kernel<cuda::kWideTile>, cuda::kWideTile);
  return int(cudaGetLastError());
}

int cholesky_inverse_cuda(const float* partials, int64_t batch, int64_t slabs, int64_t l, float* gram, float* scale,
                          float* inverse, int32_t* status, DeviceStream stream) {
  cuda::gram_sum_kernel<<<blocks_for(batch * l * l), kThreads, 0, cuda_stream(stream)>>>(
      partials, batch, slabs, l, l <= cuda::kNarrowTile ? cuda::kNarrowTile : cuda::kWideTile, gram);
  cuda::cholesky_inverse_kernel<<<unsigned(batch), cuda::kQrThreads, 0, cuda_stream(stream)>>>(gram, scale, inverse,
                                                                                               status, l);
  return int(cudaGetLastError());
}

int multiply_upper_cuda(float* x, const float* inverse, const int32_t* status, int64_t batch, int64_t rows, int64_t l,
                        DeviceStream stream) {
  if (batch * rows == 0) return 0;
  const auto launch = [&](auto kernel, int64_t tile) {
    kernel<<<unsigned(batch * ceil_div(rows, tile)), cuda::kQrThreads, 0, cuda_stream(stream)>>>(x, inverse, status,
                                                                                                 int(rows), int(l));
  };
  if (l <= cuda::kNarrowTile) launch(cuda::multiply_upper_kernel<cuda::kNarrowTile>, cuda::kNarrowTile);
  else launch(cuda::multiply_upper_kernel<cuda::kWideTile>, cuda::kWideTile);
  return int(cudaGetLastError());
}

}  // namespace lift
