// Gather, scatter, migration and sums of squares over index lists, on the CPU.
#include <algorithm>
#include <vector>

#include "../launchers.h"
#include "dtypes.h"
#include "levels.h"
#include "parallel.h"

namespace lift {
namespace {

int64_t chunk_count(int64_t n) { return (n + kChunk - 1) / kChunk; }

// Copies the values of entries that are in both lists. begin .. end are positions in the new list.
template <class T>
void merge(const T* values, const int32_t* old_indices, int64_t k_old, const int32_t* new_indices, int64_t begin,
           int64_t end, T* out) {
  const int32_t* at = std::lower_bound(old_indices, old_indices + k_old, new_indices[begin]);
  const int32_t* const last = old_indices + k_old;
  for (int64_t j = begin; j < end; ++j) {
    while (at < last && *at < new_indices[j]) ++at;
    if (at == last) return;
    if (*at == new_indices[j]) out[j] = values[at - old_indices];
  }
}

}  // namespace

void packed_gather_cpu(const void* source, DType from, const int32_t* indices, int64_t k, void* out, DType to,
                       ParallelFor parallel_for, int64_t base, int64_t chunk) {
  dispatch_dtype(from, [&](auto a) {
    dispatch_dtype(to, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      const auto* src = static_cast<const typename A::Storage*>(source);
      auto* dst = static_cast<typename B::Storage*>(out);
      for_ranges(parallel_for, (k + chunk - 1) / chunk, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(end * chunk, k);
        for (int64_t j = begin * chunk; j < last; ++j) dst[j] = convert<A, B>(src[indices[j] - base]);
      });
    });
  });
}

void packed_scatter_cpu(void* dest, DType to, const int32_t* indices, int64_t k, const void* values, DType from,
                        ParallelFor parallel_for) {
  dispatch_dtype(from, [&](auto a) {
    dispatch_dtype(to, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      const auto* src = static_cast<const typename A::Storage*>(values);
      auto* dst = static_cast<typename B::Storage*>(dest);
      for_ranges(parallel_for, chunk_count(k), [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(end * kChunk, k);
        for (int64_t j = begin * kChunk; j < last; ++j) dst[indices[j]] = convert<A, B>(src[j]);
      });
    });
  });
}

void packed_migrate_cpu(const void* values, int width, const int32_t* old_indices, int64_t k_old,
                        const int32_t* new_indices, int64_t k_new, void* out, ParallelFor parallel_for) {
  for_ranges(parallel_for, chunk_count(k_new), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk, last = std::min(end * kChunk, k_new);
    if (width == 4)
      merge(static_cast<const uint32_t*>(values), old_indices, k_old, new_indices, first, last,
            static_cast<uint32_t*>(out));
    else
      merge(static_cast<const uint16_t*>(values), old_indices, k_old, new_indices, first, last,
            static_cast<uint16_t*>(out));
  });
}

int64_t square_sum_blocks(const Segment* segments, int64_t n) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < n; ++i) blocks += (segments[i].count + kSquareSumBlock - 1) / kSquareSumBlock;
  return blocks;
}

void packed_square_sums_cpu(const Segment* segments, int64_t n, const int32_t* indices, DType grad, bool packed_grads,
                            double* partials, ParallelFor parallel_for) {
  std::vector<std::pair<int64_t, int64_t>> tasks;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t at = 0; at < segments[i].count; at += kSquareSumBlock) tasks.emplace_back(i, at);
  const StepLoops& loops = step_loops();
  dispatch_dtype(grad, [&](auto type) {
    using G = decltype(type);
    for_ranges(parallel_for, int64_t(tasks.size()), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Segment& segment = segments[tasks[t].first];
        const int64_t first = tasks[t].second, last = std::min(first + kSquareSumBlock, segment.count);
        const auto* g = static_cast<const typename G::Storage*>(segment.grad);
        const int32_t* index = indices + segment.offset;
        double sums[4] = {0, 0, 0, 0};  // independent chains, summed in a fixed order
        if (packed_grads) loops.add_squares[G::number](g + first, last - first, sums);
        for (int64_t j = first; j < last && !packed_grads; ++j) {
          const double x = G::widen(g[index[j]]);
          sums[j & 3] += x * x;
        }
        partials[t] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    });
  });
}

}  // namespace lift
