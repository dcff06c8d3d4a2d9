// bitmap_to_indices with small blocks, which even small matrices fill: `program INPUT OUTPUT [BARRIER]` runs the calls of a file.
//
// A call in INPUT: int64 b, m, n, capacity, k; then bitmaps, candidates and counts as in the op. In OUTPUT: indices, thresholds and
// status; before them one number, the place of the last of more tiles than a block has threads. The barrier of that number in the
// source, from 0, is left out.
#include "shim.h"

#include <fstream>

namespace {

int dropped = -1;
void barrier() { __syncthreads(); }

}  // namespace

#define __syncthreads() (__COUNTER__ == dropped ? void() : barrier())
#include "bitmap.cuh"
constexpr int kBarriers = __COUNTER__;

namespace {

constexpr int kThreads = 64, kBits = 5, kStage = 96;

int32_t last_place() {
  constexpr unsigned kTiles = 200;
  std::vector<int32_t> totals(kTiles, 5), status(1);
  std::vector<uint32_t> thresholds(1);
  shim::launch(1, kThreads, [&] {
    lift::cuda::bitmap_place_kernel<kThreads>(totals.data(), kTiles, 1000, thresholds.data(), status.data());
  });
  return totals.back();
}

// In memory of its own, so that AddressSanitizer sees its ends.
template <class T>
std::vector<T> read(std::ifstream& file, int64_t count) {
  std::vector<T> values(count);
  file.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * int64_t(sizeof(T))));
  return values;
}
template <class T>
void write(std::ofstream& file, const std::vector<T>& values) {
  file.write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(T)));
}

}  // namespace

int main(int count, char** arguments) {
  using namespace lift::cuda;
  if (count < 3) return 2;
  if (count > 3) dropped = std::atoi(arguments[3]);
  if (dropped >= kBarriers) return 3;
  std::ifstream input(arguments[1], std::ios::binary);
  std::ofstream output(arguments[2], std::ios::binary);
  write(output, std::vector{last_place()});
  while (input.peek() != EOF) {
    const std::vector<int64_t> sizes = read<int64_t>(input, 5);
    const int64_t b = sizes[0], capacity = sizes[3], k = sizes[4];
    const Bitmap form = Bitmap::of(sizes[1], sizes[2]);
    auto bitmaps = read<uint32_t>(input, b * form.words);
    const auto candidates = read<Candidate>(input, b * capacity);
    const auto counts = read<int32_t>(input, 2 * b);
    const unsigned tiles = unsigned(form.tiles(kThreads)), matrices = unsigned(b);
    std::vector<int32_t> totals(tiles * matrices, -7), indices(b * k, -7), status(b, -7);
    std::vector<uint32_t> thresholds(b, 7);
    shim::launch(matrices, kThreads, [&] {
      bitmap_choose_kernel<kThreads, kBits>(bitmaps.data(), form, candidates.data(), capacity, counts.data(), k, thresholds.data(),
                                            status.data());
    });
    shim::launch(tiles * matrices, kThreads, [&] { bitmap_count_kernel<kThreads>(bitmaps.data(), form, tiles, totals.data()); });
    shim::launch(matrices, kThreads, [&] {
      bitmap_place_kernel<kThreads>(totals.data(), tiles, k, thresholds.data(), status.data());
    });
    shim::launch(tiles * matrices, kThreads, [&] {
      bitmap_list_kernel<kThreads, kStage>(bitmaps.data(), form, tiles, totals.data(), status.data(), k, indices.data());
    });
    write(output, indices);
    write(output, thresholds);
    write(output, status);
  }
}
