// Device code of gaussian_sketch_: normal numbers from Philox4x32-10 (Salmon et al. 2011) by
// Box-Muller. The file uses neither torch nor launch syntax.
//
// Numbers 4g .. 4g+3 of a matrix come from counter (g, matrix) under the key `seed`. So a number is
// a function of (seed, matrix, position) and does not depend on the launch.
#pragma once

#include <cstdint>

#include "vectorized.cuh"

namespace lift::cuda {

struct Philox {
  uint32_t x[4];
};

__device__ __forceinline__ Philox philox(uint64_t group, uint64_t matrix, uint64_t seed) {
  Philox c{{uint32_t(group), uint32_t(group >> 32), uint32_t(matrix), uint32_t(matrix >> 32)}};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.x[0], b = uint64_t(0xCD9E8D57u) * c.x[2];
    c = Philox{{uint32_t(b >> 32) ^ c.x[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ c.x[3] ^ key1, uint32_t(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Makes two independent normal numbers from two words. The first uniform number is in (0, 1], so
// its logarithm is finite.
__device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float* out) {
  const float radius = sqrtf(-2.0f * logf(float(a) * 0x1p-32f + 0x1p-33f));
  float sine, cosine;
  sincospif(float(b) * 0x1p-31f, &sine, &cosine);
  out[0] = radius * cosine;
  out[1] = radius * sine;
}

// Writes `count` numbers for each of `matrices` matrices. A thread fills 16 bytes at a time, in one
// store if they are aligned to 16 bytes.
template <class T>
__global__ void gaussian_sketch_kernel(T* __restrict__ out, int64_t matrices, int64_t count, uint64_t seed,
                                       uint64_t first) {
  constexpr int kLanes = 16 / int(sizeof(T));
  const int64_t vectors = (count + kLanes - 1) / kLanes;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t v = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; v < matrices * vectors; v += stride) {
    const int64_t matrix = v / vectors, start = v % vectors * kLanes;
    float normal[kLanes];
    for (int part = 0; part < kLanes / 4; ++part) {
      const Philox words = philox(uint64_t(start / 4 + part), first + uint64_t(matrix), seed);
      box_muller(words.x[0], words.x[1], normal + 4 * part);
      box_muller(words.x[2], words.x[3], normal + 4 * part + 2);
    }
    T* const target = out + matrix * count + start;
    if (aligned(target) && start + kLanes <= count) {
      AlignedVector<T, kLanes> wide;
      for (int i = 0; i < kLanes; ++i) wide.x[i] = T(normal[i]);
      *reinterpret_cast<AlignedVector<T, kLanes>*>(target) = wide;
    } else {
      for (int i = 0; i < kLanes; ++i)
        if (start + i < count) target[i] = T(normal[i]);
    }
  }
}

}  // namespace lift::cuda
