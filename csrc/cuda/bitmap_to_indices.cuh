// Device code of bitmap_to_indices, which turns the bitmaps of many matrices into sorted lists of
// exactly k positions. The file uses neither torch nor launch syntax, so tests can compile it with
// a host compiler.
//
// Four kernels run one after the other. `choose` finds the largest candidates and sets their bits,
// `count` counts the bits of every tile, `place` computes where the positions of each tile begin,
// and `list` writes the positions. Thread blocks consist of whole warps. The atomics are integer
// add, or and min, so their order changes no result.
#pragma once

#include <cstdint>

#include "vectorized.cuh"

namespace lift::cuda {

// key << 32 | (2^31 - 1 - position). The key is the bits of an fp32 value without its sign.
using Candidate = unsigned long long;

constexpr int kWarp = 32;
constexpr uint32_t kLastPosition = 0x7FFFFFFF, kNaN = 0x7FC00000;
constexpr int kWordsPerThread = 4;  // one 128-bit load
// Launch parameters. Kernels with one block per matrix use large blocks. Up to a density of 12 %,
// the positions of 1024 words fit into the staging buffer at once.
constexpr int kMatrixThreads = 1024, kDigitBits = 11, kTileThreads = 256, kStage = 4096;

// The shape of a bitmap of up to 2^31-1 bits. Each row begins in a new word.
struct BitmapShape {
  uint32_t rows, columns, width, words;

  static constexpr BitmapShape of(int64_t rows, int64_t columns) {
    const int64_t width = (columns + 31) / 32;
    return {uint32_t(rows), uint32_t(columns), uint32_t(width), uint32_t(rows * width)};
  }
  constexpr int64_t tiles(int threads) const {
    const int64_t tile = int64_t(threads) * kWordsPerThread;
    return (words + tile - 1) / tile;
  }
};

// Returns the sum of `value` over the threads before this one. `total` becomes the sum over all
// threads. The caller may write `sums` again after the next barrier.
template <int kThreads>
__device__ int block_scan(int value, int* sums, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before;
}

// Calls f(candidate) for each of the first `count` candidates, spread over the thread block.
template <int kThreads, class F>
__device__ void for_each_candidate(const Candidate* __restrict__ candidates, uint32_t count, const F& f) {
  uint32_t done = 0;
  if (aligned(candidates)) {
    done = count / 2 * 2;
    for (uint32_t i = threadIdx.x; i < count / 2; i += kThreads) {
      const auto pair = reinterpret_cast<const AlignedVector<Candidate, 2>*>(candidates)[i];
      f(pair.x[0]);
      f(pair.x[1]);
    }
  }
  for (uint32_t i = done + threadIdx.x; i < count; i += kThreads) f(candidates[i]);
}

// One block per matrix. If the bracket holds the k-th magnitude, sets the bits of the k - definite
// largest candidates, with status 0. Otherwise the status is 1 and the threshold NaN. The pivot is
// found by radix select with digits of kBits bits, from the highest bit in which two candidates
// differ.
template <int kThreads, int kBits>
__global__ void __launch_bounds__(kThreads)
bitmap_choose_kernel(uint32_t* __restrict__ bitmaps, BitmapShape shape, const Candidate* __restrict__ candidates,
                     int64_t capacity, const int32_t* __restrict__ counts, int64_t k,
                     uint32_t* __restrict__ thresholds, int32_t* __restrict__ status) {
  constexpr int kBins = 1 << kBits, kBinsPerThread = (kBins + kThreads - 1) / kThreads;
  __shared__ int bins[kBins], sums[kThreads / kWarp], bin, above, inside;
  __shared__ Candidate differing_bits;
  __shared__ uint32_t smallest_key;
  const int64_t matrix = blockIdx.x, definite = counts[2 * matrix], near = counts[2 * matrix + 1];
  if (definite >= k || definite + near < k || near > capacity) {
    if (threadIdx.x == 0) thresholds[matrix] = kNaN, status[matrix] = 1;
    return;
  }
  const Candidate* const own = candidates + matrix * capacity;
  if (threadIdx.x == 0) differing_bits = 0, smallest_key = ~0u;
  __syncthreads();
  Candidate bits = 0;
  for_each_candidate<kThreads>(own, uint32_t(near), [&](Candidate c) { bits |= c ^ own[0]; });
  for (int step = kWarp / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(~0u, bits, step);
  if (threadIdx.x % kWarp == 0) atomicOr(&differing_bits, bits);
  __syncthreads();

  // The bits of the pivot from `low` up are known. `matching` candidates have these bits, and
  // `rank` of them are chosen.
  int low = differing_bits == 0 ? 0 : 64 - __clzll(differing_bits);
  Candidate known_mask = low == 64 ? 0 : ~Candidate{0} << low, pivot = own[0] & known_mask;
  int rank = int(k - definite), matching = int(near);
  while (low > 0 && matching > rank) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    const int shift = low > kBits ? low - kBits : 0;
    for_each_candidate<kThreads>(own, uint32_t(near), [&](Candidate c) {
      if (((c ^ pivot) & known_mask) == 0) atomicAdd(&bins[(c >> shift) % kBins], 1);
    });
    __syncthreads();
    int sum = 0, total;
    const int first = kBins - 1 - int(threadIdx.x) * kBinsPerThread;  // from the highest bin down
    for (int i = first; i > first - kBinsPerThread && i >= 0; --i) sum += bins[i];
    int before = block_scan<kThreads>(sum, sums, total);
    if (before < rank && rank <= before + sum) {
      int i = first;
      while (before + bins[i] < rank) before += bins[i--];
      bin = i, above = before, inside = bins[i];
    }
    __syncthreads();
    pivot |= Candidate(bin) << shift;
    known_mask = ~Candidate{0} << shift;
    low = shift;
    rank -= above;
    matching = inside;
  }

  uint32_t* const bitmap = bitmaps + matrix * shape.words;
  uint32_t key = ~0u;
  for_each_candidate<kThreads>(own, uint32_t(near), [&](Candidate c) {
    const uint32_t position = kLastPosition - uint32_t(c & kLastPosition), row = position / shape.columns;
    if (c < pivot) return;
    if (uint32_t(c >> 32) < key) key = uint32_t(c >> 32);
    if (row < shape.rows)
      atomicOr(&bitmap[row * shape.width + position % shape.columns / 32], 1u << position % shape.columns % 32);
  });
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, key, step);
    if (other < key) key = other;
  }
  if (threadIdx.x % kWarp == 0) atomicMin(&smallest_key, key);
  __syncthreads();
  if (threadIdx.x == 0) thresholds[matrix] = smallest_key, status[matrix] = 0;
}

// Loads the four words of a thread, from word number `word` of a matrix. Clears the bits beyond the
// last column.
__device__ inline AlignedVector<uint32_t, kWordsPerThread> load_words(const uint32_t* __restrict__ bitmap,
                                                                      BitmapShape shape, uint32_t word) {
  AlignedVector<uint32_t, kWordsPerThread> words = {};
  if (aligned(bitmap) && word + kWordsPerThread <= shape.words) {
    words = *reinterpret_cast<const AlignedVector<uint32_t, kWordsPerThread>*>(bitmap + word);
  } else {
    for (int i = 0; i < kWordsPerThread; ++i)
      if (word + i < shape.words) words.x[i] = bitmap[word + i];
  }
  if (shape.columns % 32 != 0) {
    for (int i = 0; i < kWordsPerThread; ++i)
      if ((word + i + 1) % shape.width == 0) words.x[i] &= (1u << shape.columns % 32) - 1;
  }
  return words;
}

__device__ inline int count_bits(const AlignedVector<uint32_t, kWordsPerThread>& words) {
  int sum = 0;
  for (int i = 0; i < kWordsPerThread; ++i) sum += __popc(words.x[i]);
  return sum;
}

// One block per tile. totals[block] becomes the number of bits set in the tile.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
bitmap_count_kernel(const uint32_t* __restrict__ bitmaps, BitmapShape shape, uint32_t tiles,
                    int32_t* __restrict__ totals) {
  __shared__ int sums[kThreads / kWarp];
  const uint32_t matrix = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const uint32_t word = (tile * kThreads + threadIdx.x) * kWordsPerThread;
  int total;
  block_scan<kThreads>(count_bits(load_words(bitmaps + int64_t(matrix) * shape.words, shape, word)), sums, total);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// One block per matrix. Replaces the totals by the number of bits set before each tile. If the
// matrix does not have k bits in all, the status becomes 1 and the threshold NaN.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
bitmap_place_kernel(int32_t* __restrict__ totals, uint32_t tiles, int64_t k, uint32_t* __restrict__ thresholds,
                    int32_t* __restrict__ status) {
  __shared__ int sums[kThreads / kWarp];
  const int64_t matrix = blockIdx.x;
  int32_t* const own = totals + matrix * tiles;
  int before_all = 0;
  for (uint32_t start = 0; start < tiles; start += kThreads) {
    const uint32_t tile = start + threadIdx.x;
    int total;
    const int before = block_scan<kThreads>(tile < tiles ? own[tile] : 0, sums, total);
    if (tile < tiles) own[tile] = before_all + before;
    before_all += total;
    __syncthreads();
  }
  if (threadIdx.x == 0 && before_all != k) thresholds[matrix] = kNaN, status[matrix] = 1;
}

// One block per tile. Writes the positions of the tile, or -1 everywhere if the status is 1. The
// positions are staged in shared memory, so that 128-bit stores can write them.
template <int kThreads, int kStaged>
__global__ void __launch_bounds__(kThreads)
bitmap_list_kernel(const uint32_t* __restrict__ bitmaps, BitmapShape shape, uint32_t tiles,
                   const int32_t* __restrict__ first_slots, const int32_t* __restrict__ status, int64_t k,
                   int32_t* __restrict__ indices) {
  static_assert(kStaged % 4 == 0);
  alignas(16) __shared__ int32_t stage[kStaged + 4];
  __shared__ int sums[kThreads / kWarp];
  const uint32_t matrix = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  int32_t* const list = indices + matrix * k;
  if (status[matrix] != 0) {
    for (int64_t j = int64_t(tile) * kThreads + threadIdx.x; j < k; j += int64_t(tiles) * kThreads) list[j] = -1;
    return;
  }
  const uint32_t word = (tile * kThreads + threadIdx.x) * kWordsPerThread;
  const auto words = load_words(bitmaps + int64_t(matrix) * shape.words, shape, word);
  int total;
  const int before = block_scan<kThreads>(count_bits(words), sums, total);
  int32_t* const out = list + first_slots[blockIdx.x];
  // Positions are staged at this offset, so that they are aligned in shared memory as in `out`.
  const int misalignment = int(reinterpret_cast<uintptr_t>(out) / 4 % 4);
  for (int start = 0; start < total; start += kStaged) {
    int place = before - start;
    for (int i = 0; i < kWordsPerThread; ++i) {
      const int count = __popc(words.x[i]);
      if (place < kStaged && place + count > 0) {
        const uint32_t at = word + i, position = at / shape.width * shape.columns + at % shape.width * 32;
        int slot = place;
        for (uint32_t rest = words.x[i]; rest != 0; rest &= rest - 1, ++slot)
          if (slot >= 0 && slot < kStaged)
            stage[misalignment + slot] = int32_t(position + uint32_t(__ffs(int(rest))) - 1);
      }
      place += count;
    }
    __syncthreads();
    const int end = misalignment + (total - start < kStaged ? total - start : kStaged);
    const int wide_begin = (misalignment + 3) / 4, wide_end = end / 4;
    int32_t* const base = out + start - misalignment;
#pragma unroll 1  // few iterations; unrolled, their registers would reduce the occupancy
    for (int i = wide_begin + int(threadIdx.x); i < wide_end; i += kThreads)
      reinterpret_cast<AlignedVector<int32_t, 4>*>(base)[i] =
          reinterpret_cast<const AlignedVector<int32_t, 4>*>(stage)[i];
    const int i = int(threadIdx.x);  // the two ends, up to three positions each
    if (i >= misalignment && i < 4 * wide_begin && i < end) base[i] = stage[i];
    if (wide_end >= wide_begin && 4 * wide_end + i < end) base[4 * wide_end + i] = stage[4 * wide_end + i];
    __syncthreads();
  }
}

}  // namespace lift::cuda
