// bitmap_to_indices with small blocks, as a library and as a program for the sanitizers.
#include "shim.h"

#include <cstdio>
#include <cstdlib>

namespace {

int dropped = -1;  // number of the barrier in the source, from 0, that is left out
void barrier() { __syncthreads(); }

}  // namespace

#define __syncthreads() (__COUNTER__ == dropped ? void() : barrier())
#include "bitmap.cuh"
constexpr int kBarriers = __COUNTER__;

namespace {

constexpr int kThreads = 64, kBits = 5, kStage = 96;

}  // namespace

extern "C" void bitmap_to_indices(uint32_t* bitmaps, int64_t b, int64_t m, int64_t n, const uint64_t* candidates, int64_t capacity,
                                  const int32_t* counts, int64_t k, int32_t* indices, uint32_t* thresholds, int32_t* status) {
  using namespace lift::cuda;
  const Bitmap form = Bitmap::of(m, n);
  const unsigned tiles = unsigned(form.tiles(kThreads)), matrices = unsigned(b);
  std::vector<int32_t> totals(tiles * matrices, -1);
  const auto* noted = reinterpret_cast<const Candidate*>(candidates);
  shim::launch(matrices, kThreads, [&] {
    bitmap_choose_kernel<kThreads, kBits>(bitmaps, form, noted, capacity, counts, k, thresholds, status);
  });
  shim::launch(tiles * matrices, kThreads, [&] { bitmap_count_kernel<kThreads>(bitmaps, form, tiles, totals.data()); });
  shim::launch(matrices, kThreads, [&] { bitmap_place_kernel<kThreads>(totals.data(), tiles, k, thresholds, status); });
  shim::launch(tiles * matrices, kThreads, [&] {
    bitmap_list_kernel<kThreads, kStage>(bitmaps, form, tiles, totals.data(), status, k, indices);
  });
}

// Two matrices, one of them missed by its bracket; prints some of the lists, the threshold's pattern and the statuses. Then places
// more tiles than a block has threads, and prints the last place.
int main(int count, char** values) {
  if (count > 1) dropped = std::atoi(values[1]);
  if (dropped >= kBarriers) return 2;
  constexpr int b = 2, m = 70, n = 130, width = 5, near = 400, k = 1000, definite = m * 9;  // set bits in a row
  std::vector<uint32_t> bitmaps(b * m * width, 0x10001u), thresholds(b);
  std::vector<uint64_t> candidates(b * near);
  std::vector<int32_t> counts{definite, near, k, near}, indices(b * k), status(b);
  for (int i = 0; i < b * near; ++i) {
    const int position = i % near * 20 + 3, column = position % n % 32;
    const uint64_t key = 1000 + i * 37 % 200;
    candidates[i] = key << 32 | (0x7FFFFFFF - uint64_t(position + (column % 16 == 0)));
  }
  bitmap_to_indices(bitmaps.data(), b, m, n, candidates.data(), near, counts.data(), k, indices.data(), thresholds.data(), status.data());
  std::printf("%d %d %u %d %d %d\n", indices[0], indices[k - 1], thresholds[0], status[0], status[1], indices[2 * k - 1]);
  std::vector<int32_t> totals(200, 5);
  shim::launch(1, kThreads, [&] {
    lift::cuda::bitmap_place_kernel<kThreads>(totals.data(), 200, 1000, thresholds.data(), status.data());
  });
  std::printf("%d %d\n", totals[199], status[0]);
}
