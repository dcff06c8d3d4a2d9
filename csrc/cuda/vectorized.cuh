// Vectorized memory accesses of device code: several neighboring values in one load or store, where
// their addresses allow it.
#pragma once

#include <cstdint>

namespace lift::cuda {

// kCount neighboring values, aligned so that one access of up to 16 bytes moves them all.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) AlignedVector {
  T x[kCount];
};

__device__ inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class... Pointers>
__device__ inline bool all_aligned(Pointers... pointers) {
  return (aligned(pointers) && ...);
}

}  // namespace lift::cuda
