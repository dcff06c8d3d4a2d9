// Raw-pointer prototypes shared by the bindings and the kernels. No torch header is included, so a
// kernel file can be compiled and tested alone.
#pragma once

#include <cstdint>

namespace lift {

enum class DType : int { f32, bf16, f16, i32, code8 };  // code8: of moments

// Runs body(begin, end) over disjoint ranges of [0, n), possibly in several threads. Returns when
// all ranges are done.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, ParallelBody body, void* context);

constexpr int kGroup = 32;  // entries of an 8-bit moment that share a scale

// One matrix of a step: its weight, its gradient, its segment of the arenas, and its step count.
struct Segment {
  void* weight;      // m*n entries, or `count` packed entries
  const void* grad;  // the same
  int64_t offset;    // first arena position
  int64_t count;
  float step;  // number of updates of this matrix, including this one
};

// Arenas and group-wide settings of a step. Missing optional arenas are null. Settings stay fp64
// until scalars are formed from them.
struct AdamW {
  const int32_t* indices;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;  // of 8-bit moments, one for kGroup entries
  float* exp_avg_sq_scale;
  float* master;
  int16_t* master_low;  // low halves of masters, in place of `master`
  const int32_t* births;
  const float* bias_table;  // 2 rows of bias_ages + 1 entries: 1/bc1, 1/sqrt(bc2) by age
  int64_t bias_ages;
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  float grad_factor;  // inv_scale, negated to maximize
  bool packed_grads;
  bool packed_weights;
  bool stochastic;
  uint32_t seed;  // for stochastic rounding
};

void sparse_adamw_cpu(const Segment* segments, int64_t n, const AdamW& adamw, DType weight, DType grad, DType moment,
                      ParallelFor parallel_for);

// Entries per work item. kChunk is for sources in memory. kCachedChunk is for sources in the
// caches, where processing fewer entries takes less time than waking a thread.
constexpr int64_t kChunk = 16384;
constexpr int64_t kCachedChunk = 1 << 18;
// `base` is the flat position of the first element of `source`.
void packed_gather_cpu(const void* source, DType from, const int32_t* indices, int64_t k, void* out, DType to,
                       ParallelFor parallel_for, int64_t base = 0, int64_t chunk = kChunk);
void packed_scatter_cpu(void* dest, DType to, const int32_t* indices, int64_t k, const void* values, DType from,
                        ParallelFor parallel_for);
// The caller fills `out` with the values of new entries. `width` is bytes per value, 2 or 4.
void packed_migrate_cpu(const void* values, int width, const int32_t* old_indices, int64_t k_old,
                        const int32_t* new_indices, int64_t k_new, void* out, ParallelFor parallel_for);

// One matrix that gets a new index list: its weight, the list, and its segment of the arenas. The
// arenas have space for either count from `offset` on.
struct Migration {
  const void* weight;
  const int32_t* new_indices;
  int64_t offset;
  int64_t old_count;
  int64_t new_count;
  int32_t step;  // number of updates of this matrix
};

// What moves along. Missing optional arenas are null.
struct MigrationArenas {
  int32_t* indices;
  void* exp_avg;
  void* exp_avg_sq;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
  float* master;
  int16_t* master_low;
  int32_t* births;
};

// Entries in both lists keep their values. Entering ones get zero moments, the weight's value and
// the step. `kept` gets the number of entries that stay, by matrix. Scratch is 16 bytes an entry of
// 2^20 or of the largest list.
void arena_migrate_cpu(const Migration* matrices, int64_t n, const MigrationArenas& arenas, DType weight,
                       DType moment, int64_t* kept, ParallelFor parallel_for);

// Writes one sum of squares per block of kSquareSumBlock entries, in the order of the segments.
// Only grad, offset and count of a segment are read.
constexpr int64_t kSquareSumBlock = 8192;
int64_t square_sum_blocks(const Segment* segments, int64_t n);
void packed_square_sums_cpu(const Segment* segments, int64_t n, const int32_t* indices, DType grad, bool packed_grads,
                            double* partials, ParallelFor parallel_for);

// Writes the sorted positions of the k largest |left right^T| (left m x rank, right n x rank). Ties
// go to the lower position. Returns the k-th magnitude, which [low, high) should contain. If it
// does not, four sweeps are needed instead of one. NaN for `low` has the interval estimated from
// sampled entries.
float lowrank_topk_cpu(const float* left, const float* right, int64_t m, int64_t n, int64_t rank, int64_t k, float low,
                       float high, int32_t* indices, ParallelFor parallel_for);

// Row panels of the weight gradient of a linear layer. panel_rows: rows per panel for an m x n
// matrix with elements of `width` bytes. panel_entries: the range of the index list that lies in
// rows row .. row + rows.
struct PanelEntries {
  int64_t first, count;
};
int64_t panel_rows(int64_t m, int64_t n, int64_t width);
PanelEntries panel_entries(const int32_t* indices, int64_t k, int64_t row, int64_t rows, int64_t n);

// The CUDA functions, present if the build found nvcc. Launches return 0 or a cudaError_t.
struct DeviceStream {
  int device;
  void* handle;  // a cudaStream_t
};

int packed_gather_cuda(const void* source, DType from, const int32_t* indices, int64_t k, void* out, DType to,
                       DeviceStream stream);
int packed_scatter_cuda(void* dest, DType to, const int32_t* indices, int64_t k, const void* values, DType from,
                        DeviceStream stream);
int packed_migrate_cuda(const void* values, int width, const int32_t* old_indices, int64_t k_old,
                        const int32_t* new_indices, int64_t k_new, void* out, DeviceStream stream);
// Turns the bitmaps (matrices x rows x ceil(columns / 32)) of a selection into sorted lists of k
// positions. `counts` holds, per matrix, the number of bits set and the number of candidates.
// `totals` is scratch of bitmap_tiles integers per matrix. The bits of the chosen candidates are
// set in `bitmaps`.
int64_t bitmap_tiles(int64_t rows, int64_t columns);
int bitmap_to_indices_cuda(int32_t* bitmaps, int64_t matrices, int64_t rows, int64_t columns, const int64_t* candidates,
                           int64_t capacity, const int32_t* counts, int64_t k, int32_t* totals, int32_t* indices,
                           float* thresholds, int32_t* status, DeviceStream stream);
// The subspace-iteration ops. Blocks are (batch, rows, l), fp32. Gram matrices and inverses are
// (batch, l, l).
int gaussian_sketch_cuda(void* out, DType dtype, int64_t matrices, int64_t count, uint64_t seed, uint64_t first,
                         DeviceStream stream);
// partials (batch, slabs, tile pairs of the upper triangle, tile, tile): Gram matrices of slabs of
// rows of `product`. If `block` is given, they are those of the next block of the Chebyshev
// recurrence, which is written to `raised`. `previous` may be null.
int gram_cuda(const float* product, const float* block, const float* previous, const float* edge, float* raised,
              int64_t batch, int64_t rows, int64_t l, int64_t slab_rows, float* partials, DeviceStream stream);
// inverse: D R^-1 of the sum of the slabs. gram and scale (batch, l) are scratch.
int cholesky_inverse_cuda(const float* partials, int64_t batch, int64_t slabs, int64_t l, float* gram, float* scale,
                          float* inverse, int32_t* status, DeviceStream stream);
int multiply_upper_cuda(float* x, const float* inverse, const int32_t* status, int64_t batch, int64_t rows, int64_t l,
                        DeviceStream stream);
int cuda_runtime_version();  // in CUDA's format, 13000 for 13.0
bool cuda_has_code();        // for the current device
int cuda_driver_version();   // 0 without a driver

}  // namespace lift
