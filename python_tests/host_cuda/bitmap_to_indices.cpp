// bitmap_to_indices on the host, as a library and as a program. The library uses the block sizes of
// a GPU. The program uses small blocks, which even small matrices fill:
// `program INPUT OUTPUT [BARRIER]` runs the calls in a file.
//
// A call in INPUT is int64 b, m, n, capacity, k, then bitmaps, candidates and counts as in the op.
// OUTPUT begins with one number: where the positions of the last tile begin, for more tiles than a
// block has threads. Then come indices, thresholds and status of each call. BARRIER is the number
// of a barrier in the source, counted from 0, which is left out.
#include "shim.h"

#include <fstream>

namespace {

int dropped = -1;
void barrier() { __syncthreads(); }

}  // namespace

#define __syncthreads() (__COUNTER__ == dropped ? void() : barrier())
#include "bitmap_to_indices.cuh"
constexpr int kBarriers = __COUNTER__;

namespace {

using namespace lift::cuda;

template <int kMatrix, int kBits, int kTile, int kStaged>
void run(uint32_t* bitmaps, BitmapShape shape, int64_t b, const Candidate* candidates, int64_t capacity,
         const int32_t* counts, int64_t k, int32_t* totals, int32_t* indices, uint32_t* thresholds, int32_t* status) {
  const unsigned tiles = unsigned(shape.tiles(kTile)), matrices = unsigned(b);
  if (matrices == 0) return;
  shim::launch(matrices, kMatrix, [&] {
    bitmap_choose_kernel<kMatrix, kBits>(bitmaps, shape, candidates, capacity, counts, k, thresholds, status);
  });
  shim::launch(tiles * matrices, kTile, [&] { bitmap_count_kernel<kTile>(bitmaps, shape, tiles, totals); });
  shim::launch(matrices, kMatrix, [&] { bitmap_place_kernel<kMatrix>(totals, tiles, k, thresholds, status); });
  shim::launch(tiles * matrices, kTile,
               [&] { bitmap_list_kernel<kTile, kStaged>(bitmaps, shape, tiles, totals, status, k, indices); });
}

constexpr int kThreads = 64;

int32_t last_place() {
  constexpr unsigned kTiles = 200;
  std::vector<int32_t> totals(kTiles, 5), status(1);
  std::vector<uint32_t> thresholds(1);
  shim::launch(1, kThreads, [&] {
    bitmap_place_kernel<kThreads>(totals.data(), kTiles, 1000, thresholds.data(), status.data());
  });
  return totals.back();
}

// Each array has its own allocation, so that AddressSanitizer knows its ends.
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

extern "C" void bitmap_to_indices(uint32_t* bitmaps, int64_t b, int64_t m, int64_t n, const Candidate* candidates,
                                  int64_t capacity, const int32_t* counts, int64_t k, int32_t* totals, int32_t* indices,
                                  uint32_t* thresholds, int32_t* status) {
  run<kMatrixThreads, kDigitBits, kTileThreads, kStage>(bitmaps, BitmapShape::of(m, n), b, candidates, capacity, counts,
                                                        k, totals, indices, thresholds, status);
}

int main(int count, char** arguments) {
  if (count < 3) return 2;
  if (count > 3) dropped = std::atoi(arguments[3]);
  if (dropped >= kBarriers) return 3;
  std::ifstream input(arguments[1], std::ios::binary);
  std::ofstream output(arguments[2], std::ios::binary);
  write(output, std::vector{last_place()});
  while (input.peek() != EOF) {
    const std::vector<int64_t> sizes = read<int64_t>(input, 5);
    const int64_t b = sizes[0], capacity = sizes[3], k = sizes[4];
    const BitmapShape shape = BitmapShape::of(sizes[1], sizes[2]);
    auto bitmaps = read<uint32_t>(input, b * shape.words);
    const auto candidates = read<Candidate>(input, b * capacity);
    const auto counts = read<int32_t>(input, 2 * b);
    std::vector<int32_t> totals(shape.tiles(kThreads) * b, -7), indices(b * k, -7), status(b, -7);
    std::vector<uint32_t> thresholds(b, 7);
    run<kThreads, 5, kThreads, 96>(bitmaps.data(), shape, b, candidates.data(), capacity, counts.data(), k,
                                   totals.data(), indices.data(), thresholds.data(), status.data());
    write(output, indices);
    write(output, thresholds);
    write(output, status);
  }
}
