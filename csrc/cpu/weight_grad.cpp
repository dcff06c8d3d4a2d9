// A weight gradient in row panels, on the CPU: how many rows a panel has, which entries lie in it, and their gather. The
// product that fills a panel is torch's own and is called by the bindings.
#include <algorithm>

#include "../launchers.h"
#include "elements.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int64_t kPanelBytes = 4 << 20;  // small enough for a share of the last cache, large enough for the product's blocking
constexpr int64_t kChunk = 1 << 18;  // the panel is warm: fewer entries take less time than waking a thread

}  // namespace

int64_t panel_rows(int64_t m, int64_t n, int64_t width) {
  return std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(n * width, 1), 1, std::max<int64_t>(m, 1));
}

PanelEntries panel_entries(const int32_t* indices, int64_t k, int64_t row, int64_t rows, int64_t n) {
  // int64 bounds: the end of the last row may be 2^31, which no int32 holds.
  const auto below = [](int32_t index, int64_t bound) { return int64_t(index) < bound; };
  const int32_t* const first = std::lower_bound(indices, indices + k, row * n, below);
  const int32_t* const last = std::lower_bound(first, indices + k, (row + rows) * n, below);
  return {first - indices, last - first};
}

void panel_gather_cpu(const void* panel, DType from, const int32_t* indices, int64_t k, int64_t base, void* out, DType to,
                      ParallelFor parallel_for) {
  with_type(from, [&](auto a) {
    with_type(to, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      const auto* src = static_cast<const typename A::Storage*>(panel);
      auto* dst = static_cast<typename B::Storage*>(out);
      for_ranges(parallel_for, (k + kChunk - 1) / kChunk, [&](int64_t begin, int64_t end) {
        const int64_t last = std::min(end * kChunk, k);
        for (int64_t j = begin * kChunk; j < last; ++j) dst[j] = convert<A, B>(src[indices[j] - base]);
      });
    });
  });
}

}  // namespace lift
