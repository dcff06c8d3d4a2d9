// The k largest |L R^T| without storing the product. Tiles of it are recomputed on the fly, and a
// bitmap marks the chosen entries.
//
// Entries are ordered by key: the bits of the fp32 value without its sign. Keys are integers in the
// order of the magnitudes, with 0 = -0 and NaN above infinity. One sweep sets the bits of the
// entries above a bracket around the k-th key and lists the entries inside it. The largest of these
// are then added. If the bracket misses the k-th key or too many entries tie, two histograms find
// the exact k-th key first.
#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <vector>

#include "../launchers.h"
#include "dtypes.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int kTileRows = 6;  // of a tile of the product, which is kept in registers
constexpr int kTileColumns = 32;
constexpr int kWordBits = 64;  // columns per word of the bitmap, two tiles
constexpr int kBandRows = 48;  // rows that share a pass over the right factor

// 16 lanes, whatever the width of the registers. The unaligned types are for loads and stores.
using Floats = float __attribute__((vector_size(64)));
using Keys = uint32_t __attribute__((vector_size(64)));
using UnalignedFloats = float __attribute__((vector_size(64), aligned(4), may_alias));
using UnalignedKeys = uint32_t __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int kLanes = 16;
constexpr int kVectors = kTileColumns / kLanes;

struct Tile {
  alignas(64) uint32_t keys[kTileRows][kWordBits];
};

// Computes keys[i][.] of kTileRows rows with one panel (rank x kTileColumns) of the right factor.
// Fused multiply-adds are used where the machine has them: the products must agree between sweeps,
// but not between machines.
__attribute__((optimize("fp-contract=fast"))) LIFT_CLONES void compute_keys(const float* const* rows,
                                                                            const float* panel, int64_t rank,
                                                                            uint32_t (*keys)[kWordBits]) {
  Floats sum[kTileRows][kVectors] = {};
  for (int64_t p = 0; p < rank; ++p) {
    const auto* right = reinterpret_cast<const UnalignedFloats*>(panel + p * kTileColumns);
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += rows[i][p] * right[v];
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<UnalignedKeys*>(keys[i] + v * kLanes) = reinterpret_cast<Keys>(sum[i][v]) & 0x7fffffffu;
}

// Bit j of the result is set if keys[j] >= bound.
LIFT_CLONES uint64_t at_least(const uint32_t* keys, uint32_t bound) {
  uint8_t flags[kWordBits];
  for (int j = 0; j < kWordBits; ++j) flags[j] = keys[j] >= bound;
  uint64_t word = 0;
  for (int j = 0; j < kWordBits; j += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, flags + j, 8);
    word |= ((bytes * 0x0102040810204080u) >> 56) << j;  // gathers the lowest bits of eight bytes
  }
  return word;
}

// L (m x rank) and R (n x rank). R is packed into panels of kTileColumns columns, zero-padded.
class Product {
 public:
  Product(const float* left, const float* right, int64_t m, int64_t n, int64_t rank, ParallelFor parallel_for)
      : left_(left),
        m_(m),
        n_(n),
        rank_(rank),
        words_per_row_((n + kWordBits - 1) / kWordBits),
        parallel_for_(parallel_for),
        panels_(size_t(words_per_row_ * kWordBits * rank)) {
    for_ranges(parallel_for, words_per_row_ * 2, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q)
        for (int64_t j = 0; j < std::min<int64_t>(kTileColumns, n - q * kTileColumns); ++j)
          for (int64_t p = 0; p < rank; ++p)
            panels_[size_t((q * rank + p) * kTileColumns + j)] = right[(q * kTileColumns + j) * rank + p];
    });
  }

  int64_t words_per_row() const { return words_per_row_; }  // of the bitmap
  int64_t bands() const { return (m_ + kBandRows - 1) / kBandRows; }
  // The bits of word w that are columns of the matrix.
  uint64_t valid_mask(int64_t w) const {
    return n_ - w * kWordBits >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << (n_ - w * kWordBits)) - 1;
  }

  // Calls visit(context, row, word, keys) for every row and word. One thread visits all rows of a
  // band. make_context() makes the context of a thread.
  template <class MakeContext, class Visit>
  void sweep(const MakeContext& make_context, const Visit& visit) const {
    for_ranges(parallel_for_, bands(), [&](int64_t begin, int64_t end) {
      auto&& context = make_context();
      for (int64_t band = begin; band < end; ++band) {
        const int64_t last = std::min(m_, (band + 1) * kBandRows);
        for (int64_t w = 0; w < words_per_row_; ++w)
          for (int64_t row = band * kBandRows; row < last; row += kTileRows) {
            const float* rows[kTileRows];
            for (int i = 0; i < kTileRows; ++i) rows[i] = left_ + std::min(row + i, m_ - 1) * rank_;
            Tile tile;
            for (int half = 0; half < 2; ++half) {
              const float* panel = panels_.data() + (2 * w + half) * rank_ * kTileColumns;
              compute_keys(rows, panel, rank_,
                           reinterpret_cast<uint32_t (*)[kWordBits]>(&tile.keys[0][half * kTileColumns]));
            }
            for (int i = 0; i < std::min<int64_t>(kTileRows, last - row); ++i) visit(context, row + i, w, tile.keys[i]);
          }
      }
    });
  }

 private:
  const float* left_;
  int64_t m_, n_, rank_, words_per_row_;
  ParallelFor parallel_for_;
  std::vector<float> panels_;
};

struct Candidate {
  uint32_t key;
  int32_t index;
  bool operator<(const Candidate& other) const {  // the order in which entries are chosen
    return key != other.key ? key > other.key : index < other.index;
  }
};

class Selection {
 public:
  Selection(const Product& product, int64_t m, int64_t n, int64_t k, ParallelFor parallel_for)
      : product_(product),
        m_(m),
        n_(n),
        k_(k),
        parallel_for_(parallel_for),
        bitmap_(size_t(m * product.words_per_row())) {}

  // Selects the entries and stores the k-th key in `threshold`, if that key lies in [low, high).
  // Otherwise returns false, and the bitmap holds nothing of use.
  bool select_in_bracket(uint32_t low, uint32_t high, uint32_t& threshold) {
    if (low >= high) return false;
    const size_t limit = size_t(std::max<int64_t>(k_, 4096));
    std::vector<Candidate> candidates;
    std::mutex mutex;
    struct ThreadCandidates {
      std::vector<Candidate> list;
      std::vector<Candidate>& all;
      std::mutex& mutex;
      size_t limit;
      ~ThreadCandidates() {
        const std::lock_guard<std::mutex> lock(mutex);
        all.insert(all.end(), list.begin(), list.end());
      }
    };
    product_.sweep([&] { return ThreadCandidates{{}, candidates, mutex, limit}; },
                   [&](ThreadCandidates& found, int64_t row, int64_t w, const uint32_t* keys) {
                     const uint64_t chosen = at_least(keys, high) & product_.valid_mask(w);
                     bitmap_[size_t(row * product_.words_per_row() + w)] = chosen;
                     if (found.list.size() > found.limit) return;
                     for (uint64_t rest = at_least(keys, low) & product_.valid_mask(w) & ~chosen; rest != 0;
                          rest &= rest - 1) {
                       const int j = std::countr_zero(rest);
                       found.list.push_back({keys[j], int32_t(row * n_ + w * kWordBits + j)});
                     }
                   });
    const int64_t missing = k_ - count();
    if (missing < 1 || missing > int64_t(candidates.size()) || candidates.size() > limit) return false;
    std::nth_element(candidates.begin(), candidates.begin() + (missing - 1), candidates.end());
    threshold = candidates[size_t(missing - 1)].key;
    for (int64_t c = 0; c < missing; ++c) {
      const int64_t row = candidates[size_t(c)].index / n_, column = candidates[size_t(c)].index % n_;
      bitmap_[size_t(row * product_.words_per_row() + column / kWordBits)] |= uint64_t{1} << (column % kWordBits);
    }
    return true;
  }

  // Finds the k-th key by two histograms, of the upper and of the lower 16 bits. A last sweep then
  // selects the entries. Of those that tie with the k-th key, it takes the first positions.
  uint32_t select_exactly() {
    int64_t above = 0;
    const uint32_t upper = histogram(above, 16, [](uint32_t) { return true; });
    const uint32_t lower = histogram(above, 0, [&](uint32_t key) { return key >> 16 == upper; });
    const uint32_t threshold = (upper << 16) | lower;
    std::vector<uint64_t> ties(bitmap_.size());
    product_.sweep([] { return 0; },
                   [&](int, int64_t row, int64_t w, const uint32_t* keys) {
                     const size_t at = size_t(row * product_.words_per_row() + w);
                     bitmap_[at] = at_least(keys, threshold + 1) & product_.valid_mask(w);
                     ties[at] = at_least(keys, threshold) & product_.valid_mask(w) & ~bitmap_[at];
                   });
    int64_t missing = k_ - above;
    for (size_t at = 0; missing > 0; ++at)
      for (uint64_t rest = ties[at]; rest != 0 && missing > 0; rest &= rest - 1, --missing) bitmap_[at] |= rest & -rest;
    return threshold;
  }

  // Writes the positions of the set bits in order.
  void write_indices(int32_t* indices) const {
    std::vector<int64_t> first(size_t(product_.bands()) + 1);
    for (int64_t band = 0; band < product_.bands(); ++band) first[size_t(band) + 1] = first[size_t(band)] + count(band);
    for_ranges(parallel_for_, product_.bands(), [&](int64_t begin, int64_t end) {
      int32_t* out = indices + first[size_t(begin)];
      for (int64_t row = begin * kBandRows; row < std::min(m_, end * kBandRows); ++row)
        for (int64_t w = 0; w < product_.words_per_row(); ++w)
          for (uint64_t rest = bitmap_[size_t(row * product_.words_per_row() + w)]; rest != 0; rest &= rest - 1)
            *out++ = int32_t(row * n_ + w * kWordBits + std::countr_zero(rest));
    });
  }

 private:
  int64_t count(int64_t band) const {
    int64_t bits = 0;
    for (int64_t at = band * kBandRows * product_.words_per_row();
         at < std::min(m_, (band + 1) * kBandRows) * product_.words_per_row(); ++at)
      bits += std::popcount(bitmap_[size_t(at)]);
    return bits;
  }

  int64_t count() const {
    int64_t bits = 0;
    for (int64_t band = 0; band < product_.bands(); ++band) bits += count(band);
    return bits;
  }

  // Considers the keys for which `wanted` is true. Returns the 16 bits from `shift` up of the k-th
  // key, and adds to `above` the number of keys whose 16 bits are larger.
  template <class Wanted>
  uint32_t histogram(int64_t& above, int shift, const Wanted& wanted) {
    std::vector<int64_t> bins(1 << 16);
    std::mutex mutex;
    struct ThreadBins {
      std::vector<int64_t> own;
      std::vector<int64_t>& all;
      std::mutex& mutex;
      ~ThreadBins() {
        const std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < own.size(); ++i) all[i] += own[i];
      }
    };
    product_.sweep([&] { return ThreadBins{std::vector<int64_t>(1 << 16), bins, mutex}; },
                   [&](ThreadBins& mine, int64_t, int64_t w, const uint32_t* keys) {
                     for (int j = 0; j < std::popcount(product_.valid_mask(w)); ++j)
                       if (wanted(keys[j])) ++mine.own[(keys[j] >> shift) & 0xffffu];
                   });
    uint32_t bin = 0xffffu;
    for (; above + bins[bin] < k_; --bin) above += bins[bin];
    return bin;
  }

  const Product& product_;
  int64_t m_, n_, k_;
  ParallelFor parallel_for_;
  std::vector<uint64_t> bitmap_;  // row-major words
};

uint32_t key_of(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffffu; }

}  // namespace

float lowrank_topk_cpu(const float* left, const float* right, int64_t m, int64_t n, int64_t rank, int64_t k, float low,
                       float high, int32_t* indices, ParallelFor parallel_for) {
  const Product product(left, right, m, n, rank, parallel_for);
  Selection selection(product, m, n, k, parallel_for);
  uint32_t threshold = 0;
  if (!selection.select_in_bracket(key_of(low), key_of(high), threshold)) threshold = selection.select_exactly();
  selection.write_indices(indices);
  return std::bit_cast<float>(threshold);
}

}  // namespace lift
