// Row panels of a weight gradient, on the CPU: how many rows a panel has and which entries lie in
// it. The bindings call torch's matrix product, which fills a panel, and then the gather of
// packed_ops.cpp.
#include <algorithm>

#include "../launchers.h"

namespace lift {
namespace {

// Small enough for a thread's share of the last-level cache, large enough for the blocking of the
// matrix product.
constexpr int64_t kPanelBytes = 4 << 20;

}  // namespace

int64_t panel_rows(int64_t m, int64_t n, int64_t width) {
  return std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(n * width, 1), 1, std::max<int64_t>(m, 1));
}

PanelEntries panel_entries(const int32_t* indices, int64_t k, int64_t row, int64_t rows, int64_t n) {
  // The bounds are int64 because the end of the last row may be 2^31, which an int32 cannot hold.
  const auto below = [](int32_t index, int64_t bound) { return int64_t(index) < bound; };
  const int32_t* const first = std::lower_bound(indices, indices + k, row * n, below);
  const int32_t* const last = std::lower_bound(first, indices + k, (row + rows) * n, below);
  return {first - indices, last - first};
}

}  // namespace lift
