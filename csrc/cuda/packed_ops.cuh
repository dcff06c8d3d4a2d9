// Device code of the packed ops. Each kernel is one grid-stride loop without shared memory or
// atomics. The file uses neither torch nor launch syntax, so tests can compile it with a host
// compiler.
#pragma once

#include <cstdint>

namespace lift::cuda {

template <class From, class To>
__global__ void packed_gather_kernel(const From* __restrict__ source, const int32_t* __restrict__ indices, int64_t k,
                                     To* __restrict__ out) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < k; j += stride) out[j] = To(source[indices[j]]);
}

template <class From, class To>
__global__ void packed_scatter_kernel(To* __restrict__ dest, const int32_t* __restrict__ indices, int64_t k,
                                      const From* __restrict__ values) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < k; j += stride) dest[indices[j]] = To(values[j]);
}

// Looks up each new entry in the old list by binary search. Entries that are not in the old list
// keep the value that the caller has put into `out`.
template <class T>
__global__ void packed_migrate_kernel(const T* __restrict__ values, const int32_t* __restrict__ old_indices,
                                      int64_t k_old, const int32_t* __restrict__ new_indices, int64_t k_new,
                                      T* __restrict__ out) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < k_new; j += stride) {
    const int32_t wanted = new_indices[j];
    int64_t low = 0, high = k_old;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (old_indices[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    if (low < k_old && old_indices[low] == wanted) out[j] = values[low];
  }
}

}  // namespace lift::cuda
