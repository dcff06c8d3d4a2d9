// Launches of bitmap_to_indices on a CUDA stream: four for a whole batch of matrices.
#include "bitmap_to_indices.cuh"
#include "launch.h"

namespace lift {

using cuda::kMatrixThreads, cuda::kDigitBits, cuda::kTileThreads, cuda::kStage;

int64_t bitmap_tiles(int64_t rows, int64_t columns) { return cuda::BitmapShape::of(rows, columns).tiles(kTileThreads); }

int bitmap_to_indices_cuda(int32_t* bitmaps, int64_t matrices, int64_t rows, int64_t columns, const int64_t* candidates,
                           int64_t capacity, const int32_t* counts, int64_t k, int32_t* totals, int32_t* indices,
                           float* thresholds, int32_t* status, DeviceStream stream) {
  if (matrices == 0) return 0;
  const cudaStream_t launch_stream = cuda_stream(stream);
  const cuda::BitmapShape shape = cuda::BitmapShape::of(rows, columns);
  const int64_t tiles = shape.tiles(kTileThreads);
  const unsigned blocks = unsigned(matrices), tile_blocks = unsigned(matrices * tiles);
  auto* const words = reinterpret_cast<uint32_t*>(bitmaps);
  auto* const threshold_bits = reinterpret_cast<uint32_t*>(thresholds);
  cuda::bitmap_choose_kernel<kMatrixThreads, kDigitBits><<<blocks, kMatrixThreads, 0, launch_stream>>>(
      words, shape, reinterpret_cast<const cuda::Candidate*>(candidates), capacity, counts, k, threshold_bits, status);
  cuda::bitmap_count_kernel<kTileThreads>
      <<<tile_blocks, kTileThreads, 0, launch_stream>>>(words, shape, unsigned(tiles), totals);
  cuda::bitmap_place_kernel<kMatrixThreads>
      <<<blocks, kMatrixThreads, 0, launch_stream>>>(totals, unsigned(tiles), k, threshold_bits, status);
  cuda::bitmap_list_kernel<kTileThreads, kStage>
      <<<tile_blocks, kTileThreads, 0, launch_stream>>>(words, shape, unsigned(tiles), totals, status, k, indices);
  return int(cudaGetLastError());
}

}  // namespace lift
