// Device code of cholesky_qr_ and chebyshev_step_: Gram matrix, Cholesky factor and its inverse,
// and the in-place product with the inverse. The file uses neither torch nor launch syntax. All
// arithmetic is fp32, and the order of every sum depends on the shapes alone.
//
// Blocks X are (batch, rows, l), row-major, with any l. Tiles have 64 columns for l up to 64, else
// 128. One round of Cholesky-QR:
//   1. partial Gram matrices of slabs of rows, and their sum G
//   2. D = diag(G)^-1/2, then R^T R = D G D by panels, then the inverse D R^-1
//   3. X <- X D R^-1
#pragma once

#include <cstdint>

#include "vectorized.cuh"

namespace lift::cuda {

constexpr int kQrThreads = 256;
// Sides of a tile. Blocks with l up to kNarrowTile use the smaller one.
constexpr int kNarrowTile = 64, kWideTile = 128;
constexpr int kTileDepth = 16;  // depth of one step of a tiled product
// Rows that are summed one by one into a Gram matrix. A longer run would cost orthonormality.
constexpr int kRunRows = 128;
constexpr int kPanelRows = 16;   // rows of a panel of the factorization
constexpr int kPanelDepth = 64;  // depth of one step of the factorization

using Float4 = AlignedVector<float, 4>;

// Loads four neighboring floats of a row of `length` floats, with zeros beyond its end. `wide` says
// that rows start on 16-byte boundaries: then one load is used.
__device__ __forceinline__ Float4 load4(const float* __restrict__ row, int at, int length, bool wide) {
  if (wide && at + 4 <= length) return *reinterpret_cast<const Float4*>(row + at);
  Float4 v;
  for (int i = 0; i < 4; ++i) v.x[i] = at + i < length ? row[at + i] : 0.0f;
  return v;
}

__device__ __forceinline__ void store4(float* __restrict__ row, int at, int length, bool wide, Float4 v) {
  if (wide && at + 4 <= length) {
    *reinterpret_cast<Float4*>(row + at) = v;
  } else {
    for (int i = 0; i < 4; ++i)
      if (at + i < length) row[at + i] = v.x[i];
  }
}

// The part of a kTile x kTile tile that one thread computes. In each dimension the thread has a
// coordinate t (0..15) and owns the rows or columns 4 t + 64 q .. 4 t + 64 q + 3.
template <int kTile>
struct ThreadTile {
  static constexpr int kQuads = kTile / 64, kSide = 4 * kQuads;
  float sum[kSide][kSide] = {};
  int ty = int(threadIdx.x) / 16, tx = int(threadIdx.x) % 16;

  // The row or column of the tile that is number i of the thread with coordinate t.
  static __device__ __forceinline__ int position(int t, int i) { return 4 * t + 64 * (i / 4) + i % 4; }

  // sum += a^T b over kTileDepth rows of two tiles in shared memory.
  __device__ __forceinline__ void add(const float (*a)[kTile + 4], const float (*b)[kTile + 4]) {
#pragma unroll 2
    for (int k = 0; k < kTileDepth; ++k) {
      float left[kSide], right[kSide];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const Float4 l = *reinterpret_cast<const Float4*>(&a[k][4 * ty + 64 * q]);
        const Float4 r = *reinterpret_cast<const Float4*>(&b[k][4 * tx + 64 * q]);
#pragma unroll
        for (int i = 0; i < 4; ++i) left[4 * q + i] = l.x[i], right[4 * q + i] = r.x[i];
      }
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
    }
  }
};

// The input of a Gram kernel: X itself, or the next block of the Chebyshev recurrence. That block
// is 2 ((2/a) Z - X) - X_previous, or (2/a) Z - X without a previous block, and is also written to
// `raised`. The pointers are those of one matrix.
struct GramInput {
  const float* product;   // Z, or X itself if `block` is null
  const float* block;     // X or null
  const float* previous;  // X_previous or null
  float* raised;          // the next block, or null if `block` is null
  float twice_inverse_edge;

  __device__ __forceinline__ Float4 load(int64_t row, int at, int l, bool wide) const {
    Float4 v = load4(product + row * l, at, l, wide);
    if (block == nullptr) return v;
    const Float4 x = load4(block + row * l, at, l, wide);
    for (int i = 0; i < 4; ++i) v.x[i] = twice_inverse_edge * v.x[i] - x.x[i];
    if (previous == nullptr) return v;
    const Float4 p = load4(previous + row * l, at, l, wide);
    for (int i = 0; i < 4; ++i) v.x[i] = 2.0f * v.x[i] - p.x[i];
    return v;
  }
};

// Blocks of the Gram matrix for which a multiprocessor must have registers. With two, the wide tile
// spills on sm_75.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kGramBlocks = 1;
#else
constexpr int kGramBlocks = 2;
#endif

// Computes the tiles (I, J), I <= J, of X^T X over each slab of rows, as partials
// (batch, slabs, pairs, kTile, kTile). Grid: (batch * pairs, slabs).
template <int kTile>
__global__ void __launch_bounds__(kQrThreads, kGramBlocks)
gram_kernel(const float* __restrict__ product, const float* __restrict__ block, const float* __restrict__ previous,
            const float* __restrict__ edge, float* __restrict__ raised, int64_t rows, int l, int64_t rows_per_slab,
            float* __restrict__ partials) {
  alignas(16) __shared__ float left[kTileDepth][kTile + 4], right[kTileDepth][kTile + 4];
  const int tiles = (l + kTile - 1) / kTile, pairs = tiles * (tiles + 1) / 2;
  const int64_t matrix = blockIdx.x / unsigned(pairs);
  int ti = 0, tj = int(blockIdx.x % pairs);
  while (tj >= tiles - ti) tj -= tiles - ti++;  // pairs are ordered (0,0), (0,1), .., (1,1), ..
  tj += ti;
  const bool diagonal = ti == tj, wide = l % 4 == 0 && all_aligned(product, block, previous, raised);
  const int64_t size = rows * l;
  const GramInput x{product + matrix * size, block == nullptr ? nullptr : block + matrix * size,
                    previous == nullptr ? nullptr : previous + matrix * size,
                    raised == nullptr ? nullptr : raised + matrix * size,
                    block == nullptr ? 0.0f : 2.0f / edge[matrix]};
  const int64_t begin = blockIdx.y * rows_per_slab, end = begin + rows_per_slab < rows ? begin + rows_per_slab : rows;
  float* const out =
      partials + ((matrix * gridDim.y + blockIdx.y) * pairs + blockIdx.x % unsigned(pairs)) * kTile * kTile;
  for (int64_t run = begin; run < end; run += kRunRows) {
    ThreadTile<kTile> tile;
    for (int64_t row = run; row < run + kRunRows && row < end; row += kTileDepth) {
#pragma unroll
      for (int quad = int(threadIdx.x); quad < kTileDepth * kTile / 4; quad += kQrThreads) {
        const int r = quad / (kTile / 4), c = quad % (kTile / 4) * 4;
        Float4 a{}, b{};
        if (row + r < end) {
          a = x.load(row + r, ti * kTile + c, l, wide);
          if (!diagonal) b = x.load(row + r, tj * kTile + c, l, wide);
          else if (x.block != nullptr) store4(x.raised + (row + r) * l, ti * kTile + c, l, wide, a);
        }
        *reinterpret_cast<Float4*>(&left[r][c]) = a;
        if (!diagonal) *reinterpret_cast<Float4*>(&right[r][c]) = b;
      }
      __syncthreads();
      tile.add(left, diagonal ? left : right);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < tile.kSide; ++i) {
#pragma unroll
      for (int q = 0; q < tile.kQuads; ++q) {  // this thread's part; it stays in L2 between runs
        Float4* const target =
            reinterpret_cast<Float4*>(out + tile.position(tile.ty, i) * kTile + 4 * tile.tx + 64 * q);
        Float4 sum = run == begin ? Float4{} : *target;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.x[k] += tile.sum[i][4 * q + k];
        *target = sum;
      }
    }
  }
}

// Sums the partial tiles, which hold the upper triangle, in the order of the slabs. Writes the
// lower triangle of G.
__global__ void gram_sum_kernel(const float* __restrict__ partials, int64_t batch, int64_t slabs, int64_t l,
                                int64_t tile, float* __restrict__ gram) {
  const int64_t tiles = (l + tile - 1) / tile, size = tiles * (tiles + 1) / 2 * tile * tile;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < batch * l * l; e += stride) {
    const int64_t matrix = e / (l * l), i = e / l % l, j = e % l;
    if (i > j) continue;
    const int64_t ti = i / tile, pair = ti * tiles - ti * (ti - 1) / 2 + j / tile - ti;
    const float* at = partials + matrix * slabs * size + pair * tile * tile + i % tile * tile + j % tile;
    float sum = 0.0f;
    for (int64_t s = 0; s < slabs; ++s) sum += at[s * size];
    gram[(matrix * l + j) * l + i] = sum;
  }
}

// kPanelRows entries of one column, which a thread works on in the factorization.
struct PanelColumn {
  float x[kPanelRows];

  // x += panel_row * value, where panel_row is one row of the staged panel.
  __device__ __forceinline__ void add(const float* __restrict__ panel_row, float value) {
#pragma unroll
    for (int q = 0; q < kPanelRows / 4; ++q) {
      const Float4 p = *reinterpret_cast<const Float4*>(panel_row + 4 * q);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * q + i] = fmaf(p.x[i], value, x[4 * q + i]);
    }
  }
};

// Shared memory of the factorization.
struct SharedStorage {
  // [k][i]: entries of R in row or column i of the current panel.
  alignas(16) float staged[kPanelDepth][kPanelRows + 4];
  float diagonal_block[kPanelRows][kPanelRows + 1];  // the current diagonal block of R
  float inverse_diagonal[kPanelRows];
  bool broke_down;
};

// The first warp factors the diagonal block in place, in its upper triangle. Each lane has a
// column. A breakdown is a pivot of at most the tolerance, or NaN.
__device__ inline void factor_diagonal_block(SharedStorage& shared, float tolerance) {
  const int lane = int(threadIdx.x);
  bool broke_down = false;
  for (int i = 0; i < kPanelRows; ++i) {
    // No lane writes the pivot in this iteration: R_ii is stored at the end.
    const float pivot = shared.diagonal_block[i][i];
    broke_down = broke_down || !(pivot > tolerance);
    const float inverse = 1.0f / sqrtf(pivot);
    if (lane == i) shared.inverse_diagonal[i] = inverse;
    if (lane > i && lane < kPanelRows) shared.diagonal_block[i][lane] *= inverse;
    __syncwarp();
    for (int below = i + 1; below <= lane && lane < kPanelRows; ++below)
      shared.diagonal_block[below][lane] =
          fmaf(-shared.diagonal_block[i][below], shared.diagonal_block[i][lane], shared.diagonal_block[below][lane]);
    __syncwarp();
  }
  // pivot / sqrt(pivot)
  if (lane < kPanelRows) shared.diagonal_block[lane][lane] *= shared.inverse_diagonal[lane];
  if (lane == 0) shared.broke_down = broke_down;
}

// Factors R^T R = D G D + shift I. `gram` holds G in its lower triangle. R is written to the upper
// triangle and the diagonal; the part of G below the diagonal is kept. Returns whether the
// factorization broke down, the same to all threads.
__device__ inline bool cholesky(float* __restrict__ gram, const float* __restrict__ scale, int64_t l, float shift,
                                SharedStorage& shared) {
  const float tolerance = float(l) * 0x1p-23f;
  for (int64_t top = 0; top < l; top += kPanelRows) {
    for (int64_t first = top; first < l; first += kQrThreads) {
      const int64_t j = first + threadIdx.x;
      PanelColumn column;
#pragma unroll
      for (int i = 0; i < kPanelRows; ++i) {
        const int64_t row = top + i;
        column.x[i] = row < j && j < l ? gram[j * l + row] * scale[row] * scale[j] : row == j ? 1.0f + shift : 0.0f;
      }
      for (int64_t k = 0; k < top; k += kPanelDepth) {
        const int depth = top - k < kPanelDepth ? int(top - k) : kPanelDepth;
        __syncthreads();
        for (int e = int(threadIdx.x); e < depth * kPanelRows; e += kQrThreads) {
          const int row = e / kPanelRows, i = e % kPanelRows;
          shared.staged[row][i] = top + i < l ? gram[(k + row) * l + top + i] : 0.0f;
        }
        __syncthreads();
        if (j < l)
#pragma unroll 8
          for (int row = 0; row < depth; ++row) column.add(shared.staged[row], -gram[(k + row) * l + j]);
      }
      if (first == top) {
        if (threadIdx.x < 32) {
#pragma unroll
          for (int i = 0; i < kPanelRows; ++i)
            if (threadIdx.x < kPanelRows) shared.diagonal_block[i][threadIdx.x] = column.x[i];
          __syncwarp();
          factor_diagonal_block(shared, tolerance);
        }
        __syncthreads();
        if (shared.broke_down) return true;
      }
      if (j >= l) continue;
#pragma unroll
      for (int i = 0; i < kPanelRows; ++i) {
        float value = column.x[i];
#pragma unroll
        for (int k = 0; k < i; ++k) value = fmaf(-shared.diagonal_block[k][i], column.x[k], value);
        column.x[i] = value * shared.inverse_diagonal[i];
        // The columns of the diagonal block are already factored there, by the same recurrence.
        const int64_t row = top + i;
        if (row <= j && row < l)
          gram[row * l + j] = j < top + kPanelRows ? shared.diagonal_block[i][j - top] : column.x[i];
      }
    }
    __syncthreads();
  }
  return false;
}

// inverse <- D R^-1 with zeros below the diagonal, panel by panel from the last. Each thread has a
// column.
__device__ inline void invert_upper(const float* __restrict__ gram, const float* __restrict__ scale, int64_t l,
                                    float* __restrict__ inverse, SharedStorage& shared) {
  for (int64_t top = (l - 1) / kPanelRows * kPanelRows; top >= 0; top -= kPanelRows) {
    for (int e = int(threadIdx.x); e < kPanelRows * kPanelRows; e += kQrThreads) {
      const int i = e / kPanelRows, c = e % kPanelRows;
      const bool inside = top + i < l && top + c < l && i <= c;
      const float value = inside ? gram[(top + i) * l + top + c] : i == c ? 1.0f : 0.0f;
      shared.diagonal_block[i][c] = value;
      if (i == c) shared.inverse_diagonal[i] = 1.0f / value;
    }
    for (int64_t first = 0; first < l; first += kQrThreads) {
      const int64_t j = first + threadIdx.x, last = first + kQrThreads < l ? first + kQrThreads : l;
      PanelColumn column{};
      // From row `last` on, the inverse is zero in these columns.
      for (int64_t k = top + kPanelRows; k < last; k += kPanelDepth) {
        const int depth = last - k < kPanelDepth ? int(last - k) : kPanelDepth;
        __syncthreads();
        for (int e = int(threadIdx.x); e < kPanelDepth * kPanelRows; e += kQrThreads) {
          const int i = e / kPanelDepth, row = e % kPanelDepth;
          if (row < depth) shared.staged[row][i] = top + i < l ? gram[(top + i) * l + k + row] : 0.0f;
        }
        __syncthreads();
        if (j < l)
#pragma unroll 8
          for (int row = 0; row < depth; ++row) column.add(shared.staged[row], inverse[(k + row) * l + j]);
      }
      __syncthreads();
      if (j < l) {
#pragma unroll
        for (int i = kPanelRows - 1; i >= 0; --i) {
          float value = (j == top + i ? 1.0f : 0.0f) - column.x[i];
#pragma unroll
          for (int m = kPanelRows - 1; m > i; --m) value = fmaf(-shared.diagonal_block[i][m], column.x[m], value);
          column.x[i] = value * shared.inverse_diagonal[i];
          if (top + i < l) inverse[(top + i) * l + j] = column.x[i];
        }
      }
    }
    __syncthreads();
  }
  for (int64_t e = threadIdx.x; e < l * l; e += kQrThreads) inverse[e] *= scale[e / l];
}

// Status of a matrix:
//   0: X D R^-1 is orthonormal to working precision.
//   1: X is rank-deficient (it has a zero column, or a breakdown needed a shift). The product is
//      better conditioned than X, but not orthonormal.
//   2: X is not finite. There is no inverse, and X is left unchanged.
enum QrStatus : int32_t { kOrthonormal, kShifted, kNotFinite };

// One block per matrix. Reads the lower triangle of `gram`, whose upper triangle is scratch, and
// writes `inverse` and `status`. `scale` is scratch of l numbers per matrix. The launch bounds ask
// for one block per multiprocessor: by default the compiler aims at two and spills on sm_100.
__global__ void __launch_bounds__(kQrThreads, 1)
cholesky_inverse_kernel(float* __restrict__ gram, float* __restrict__ scale, float* __restrict__ inverse,
                        int32_t* __restrict__ status, int64_t l) {
  __shared__ SharedStorage shared;
  gram += blockIdx.x * l * l;
  inverse += blockIdx.x * l * l;
  scale += blockIdx.x * l;
  bool finite = true, deficient = false;
  for (int64_t j = threadIdx.x; j < l; j += kQrThreads) {
    const float square = gram[j * l + j];
    finite = finite && square - square == 0.0f;
    deficient = deficient || square == 0.0f;
    scale[j] = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
  }
  finite = !__syncthreads_or(!finite);
  deficient = __syncthreads_or(deficient);
  // A shift of 8 l eps exceeds the error of an fp32 Gram matrix. If it is not enough, it grows.
  float shift = 0.0f;
  for (int attempt = 0; finite && cholesky(gram, scale, l, shift, shared); ++attempt) {
    shift = attempt == 0 ? float(8 * l) * 0x1p-23f : 10.0f * shift;
    finite = attempt < 4;
    __syncthreads();
  }
  if (finite) invert_upper(gram, scale, l, inverse, shared);
  if (threadIdx.x == 0) status[blockIdx.x] = !finite ? kNotFinite : deficient || shift > 0.0f ? kShifted : kOrthonormal;
}

// X <- X U in place, with U upper triangular. Grid: batch * tiles of rows. The tiles of columns are
// computed from the last to the first. A tile needs only itself and the columns to its left, which
// still hold X.
template <int kTile>
__global__ void __launch_bounds__(kQrThreads, 2)
multiply_upper_kernel(float* __restrict__ x, const float* __restrict__ inverse, const int32_t* __restrict__ status,
                      int rows, int l) {
  alignas(16) __shared__ float left[kTileDepth][kTile + 4], right[kTileDepth][kTile + 4];
  const int row_tiles = (rows + kTile - 1) / kTile, first_row = int(blockIdx.x % unsigned(row_tiles)) * kTile;
  const int64_t matrix = blockIdx.x / unsigned(row_tiles);
  if (status[matrix] == kNotFinite) return;
  const bool wide = l % 4 == 0 && all_aligned(x, inverse);
  x += matrix * rows * l;
  inverse += matrix * l * l;
  for (int column = (l - 1) / kTile * kTile; column >= 0; column -= kTile) {
    const int depth = column + kTile < l ? column + kTile : l;
    ThreadTile<kTile> tile;
    for (int k = 0; k < depth; k += kTileDepth) {
#pragma unroll
      for (int quad = int(threadIdx.x); quad < kTileDepth * kTile / 4; quad += kQrThreads) {
        const int row = quad / (kTileDepth / 4), c = quad % (kTileDepth / 4) * 4;
        Float4 v{};
        if (first_row + row < rows) v = load4(x + int64_t(first_row + row) * l, k + c, depth, wide);
        for (int i = 0; i < 4; ++i) left[c + i][row] = v.x[i];
        const int r = quad / (kTile / 4), d = quad % (kTile / 4) * 4;
        Float4 u{};
        if (k + r < depth) u = load4(inverse + int64_t(k + r) * l, column + d, l, wide);
        *reinterpret_cast<Float4*>(&right[r][d]) = u;
      }
      __syncthreads();
      tile.add(left, right);
      __syncthreads();
    }
    for (int i = 0; i < tile.kSide; ++i) {
      const int row = first_row + tile.position(tile.ty, i);
      for (int q = 0; q < tile.kQuads; ++q) {
        const float* s = &tile.sum[i][4 * q];
        if (row < rows)
          store4(x + int64_t(row) * l, column + 4 * tile.tx + 64 * q, l, wide, Float4{{s[0], s[1], s[2], s[3]}});
      }
    }
  }
}

}  // namespace lift::cuda
