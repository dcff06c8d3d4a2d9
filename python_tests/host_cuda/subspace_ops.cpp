// The kernels of the subspace-iteration ops on the host, with the prototypes of csrc/launchers.h
// but without streams. As a program, it runs a small problem through all of them.
#include "shim.h"

#include "subspace_ops.cuh"
#include "gaussian_sketch.cuh"

#include <cstdio>
#include <vector>

using namespace lift::cuda;
using shim::launch;

extern "C" {

void gaussian_sketch(float* out, int64_t matrices, int64_t count, uint64_t seed, uint64_t first, unsigned blocks) {
  if (matrices * count == 0) return;
  launch(blocks, 64, [&] { gaussian_sketch_kernel(out, matrices, count, seed, first); });
}

void philox_words(uint64_t group, uint64_t matrix, uint64_t seed, uint32_t* out) {
  const Philox words = philox(group, matrix, seed);
  for (int i = 0; i < 4; ++i) out[i] = words.x[i];
}

void gram(const float* product, const float* block, const float* previous, const float* edge, float* raised,
          int64_t batch, int64_t rows, int64_t l, int64_t slab_rows, float* partials) {
  const auto run = [&](auto kernel, int64_t tile) {
    const int64_t tiles = (l + tile - 1) / tile;
    launch(dim3{unsigned(batch * tiles * (tiles + 1) / 2), unsigned((rows + slab_rows - 1) / slab_rows)}, kQrThreads,
           [&] { kernel(product, block, previous, edge, raised, rows, int(l), slab_rows, partials); });
  };
  if (l <= kNarrowTile) run(gram_kernel<kNarrowTile>, kNarrowTile);
  else run(gram_kernel<kWideTile>, kWideTile);
}

void cholesky_inverse(const float* partials, int64_t batch, int64_t slabs, int64_t l, float* gram, float* scale,
                      float* inverse, int32_t* status) {
  launch(3, 64, [&] { gram_sum_kernel(partials, batch, slabs, l, l <= kNarrowTile ? kNarrowTile : kWideTile, gram); });
  launch(unsigned(batch), kQrThreads, [&] { cholesky_inverse_kernel(gram, scale, inverse, status, l); });
}

void multiply_upper(float* x, const float* inverse, const int32_t* status, int64_t batch, int64_t rows, int64_t l) {
  if (batch * rows == 0) return;
  const auto run = [&](auto kernel, int64_t tile) {
    launch(unsigned(batch * ((rows + tile - 1) / tile)), kQrThreads,
           [&] { kernel(x, inverse, status, int(rows), int(l)); });
  };
  if (l <= kNarrowTile) run(multiply_upper_kernel<kNarrowTile>, kNarrowTile);
  else run(multiply_upper_kernel<kWideTile>, kWideTile);
}

}  // extern "C"

namespace {

// Runs a Chebyshev step on random blocks, which `spoil` changes first. Prints the status and
// whether the next block is orthonormal.
template <class F>
void step(int64_t rows, int64_t l, bool with_previous, const F& spoil) {
  const int64_t slab = rows < 256 ? 48 : rows, slabs = (rows + slab - 1) / slab,
                tiles = (l + kWideTile - 1) / kWideTile;
  std::vector<float> x(rows * l), z(rows * l), previous(rows * l), next(rows * l), matrix(l * l);
  std::vector<float> partials(slabs * tiles * (tiles + 1) / 2 * kWideTile * kWideTile);
  std::vector<float> inverse(l * l), scale(l);
  int32_t status = -1;
  const float edge = 1.5f;
  uint64_t seed = 0;
  for (std::vector<float>* block : {&x, &z, &previous}) gaussian_sketch(block->data(), 1, rows * l, ++seed, 0, 2);
  spoil(x, z);
  gram(z.data(), x.data(), with_previous ? previous.data() : nullptr, &edge, next.data(), 1, rows, l, slab,
       partials.data());
  cholesky_inverse(partials.data(), 1, slabs, l, matrix.data(), scale.data(), inverse.data(), &status);
  multiply_upper(next.data(), inverse.data(), &status, 1, rows, l);
  multiply_upper(x.data(), inverse.data(), &status, 1, rows, l);
  float worst = 0.0f;
  for (int64_t i = 0; i < l; ++i) {
    for (int64_t j = 0; j < l; ++j) {
      float sum = 0.0f;
      for (int64_t r = 0; r < rows; ++r) sum += next[r * l + i] * next[r * l + j];
      worst = std::isnan(sum) ? INFINITY : std::fmax(worst, std::fabs(sum - float(i == j)));
    }
  }
  std::printf("%d%s ", status, worst < 1e-4f ? " orthonormal," : ",");
}

}  // namespace

int main() {
  using Block = std::vector<float>&;
  step(40, 19, false, [](Block, Block) {});
#ifndef SHIM_DROP_LINE  // a small problem is enough to show a race
  step(200, 90, true, [](Block, Block) {});    // wide tiles, several steps of kPanelDepth
  step(170, 132, true, [](Block, Block) {});   // several tile pairs and tiles of columns
  step(300, 260, false, [](Block, Block) {});  // more columns than threads
#endif
  step(40, 19, false, [](Block x, Block z) {  // equal columns
    for (int64_t r = 0; r < 40; ++r) x[r * 19 + 7] = x[r * 19 + 2], z[r * 19 + 7] = z[r * 19 + 2];
  });
  step(40, 19, false, [](Block x, Block) { x[100] = NAN; });
}
