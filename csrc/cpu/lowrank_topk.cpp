// The k largest |L R^T| without storing the product. Tiles of it are recomputed on the fly, and a
// bitmap marks the chosen entries.
//
// Entries are ordered by key: the bits of the fp32 value without its sign. Keys are integers in the
// order of the magnitudes, with 0 = -0 and NaN above infinity. One sweep sets the bits of the
// entries above a bracket around the k-th key and lists the entries inside it. The largest of these
// are then added. If the bracket misses the k-th key or too many entries tie, two histograms find
// the exact k-th key first.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "../launchers.h"
#include "candidates.h"
#include "dtypes.h"
#include "levels.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int kBandRows = 48;  // rows that share a pass over the right factor
// Less work than this takes less time than waking a thread.
constexpr int64_t kSerialCopies = 1 << 18, kSerialProducts = 1 << 21;
// Of entries that are drawn to predict the k-th key: one in kSampled, within bounds. One drawn entry
// takes about as long as ten entries more in the bracket.
constexpr int64_t kSampled = 128, kLeastSamples = 256, kMostSamples = 32768, kSerialSamples = 1024;
constexpr double kDeviations = 3.0;  // half the bracket; one in four hundred is missed
// A bracket is given up if it holds more candidates, and more than twice the selected entries: then
// many entries tie. A bracket drawn for a small matrix holds more than there are selected entries.
constexpr int64_t kLeastCandidates = 1 << 14;

// All levels of x86-64 have an instruction that counts bits. Its baseline lacks it.
#if defined(__x86_64__)
#define LIFT_POPCNT __attribute__((target("popcnt")))
#else
#define LIFT_POPCNT
#endif

LIFT_POPCNT int64_t count_bits(const uint64_t* words, int64_t n) {
  int64_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits += std::popcount(words[i]);
  return bits;
}

// Writes the positions of the set bits of n words, counted from `first`. `last` is the end of the
// output. Of a word four positions are written, whatever their number, because a branch on it would
// be predicted wrong too often. Those that are too many are overwritten.
LIFT_POPCNT int32_t* list_bits(const uint64_t* words, int64_t n, int64_t first, int32_t* out, const int32_t* last) {
  constexpr uint64_t kTop = uint64_t{1} << (kWordBits - 1);  // so that there is always a lowest bit
  for (int64_t w = 0; w < n; ++w) {
    uint64_t rest = words[w];
    const int64_t start = first + w * kWordBits;
    int32_t* const next = out + std::popcount(rest);
    if (last - out >= 4)
      for (int i = 0; i < 4; ++i, rest &= rest - 1) *out++ = int32_t(start + std::countr_zero(rest | kTop));
    for (; rest != 0; rest &= rest - 1) *out++ = int32_t(start + std::countr_zero(rest));
    out = next;
  }
  return out;
}

struct Tile {
  alignas(64) uint32_t keys[kTileRows][kWordBits];
};

// L (m x rank) and R (n x rank). R is packed for the loops of a level, zero-padded.
class Product {
 public:
  Product(const float* left, const float* right, int64_t m, int64_t n, int64_t rank, ParallelFor parallel_for)
      : left_(left),
        right_(right),
        m_(m),
        n_(n),
        rank_(rank),
        words_per_row_((n + kWordBits - 1) / kWordBits),
        parallel_for_(parallel_for),
        loops_(product_loops()),
        panels_(std::make_unique_for_overwrite<float[]>(size_t(words_per_row_ * kWordBits * rank))) {
    const int64_t width = loops_.panel_columns;
    const bool serial = n * rank < kSerialCopies;
    for_ranges(serial ? nullptr : parallel_for, words_per_row_ * kWordBits / width, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q)
        for (int64_t j = 0; j < width; ++j)
          for (int64_t p = 0; p < rank; ++p)
            panels_[(q * rank + p) * width + j] = q * width + j < n ? right[(q * width + j) * rank + p] : 0.0f;
    });
  }

  // |x| of one entry. The last bits may differ from those of the keys.
  float magnitude(int64_t position) const {
    const float *const left = left_ + position / n_ * rank_, *const right = right_ + position % n_ * rank_;
    float sums[8] = {};
    int64_t p = 0;
    for (; p + 8 <= rank_; p += 8)
      for (int i = 0; i < 8; ++i) sums[i] += left[p + i] * right[p + i];
    for (; p < rank_; ++p) sums[0] += left[p] * right[p];
    return std::fabs(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
  }

  int64_t words_per_row() const { return words_per_row_; }  // of the bitmap
  int64_t bands() const { return (m_ + kBandRows - 1) / kBandRows; }
  // The bits of word w that are columns of the matrix.
  uint64_t valid_mask(int64_t w) const {
    return n_ - w * kWordBits >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << (n_ - w * kWordBits)) - 1;
  }

  // The columns of word w whose keys are at least `high`, and those in [low, high), as bits.
  struct Compared {
    uint64_t above, inside;
  };
  Compared compare(const uint32_t* keys, uint32_t low, uint32_t high, int64_t w) const {
    uint64_t words[2];
    loops_.at_least(keys, {low, high}, words);
    const uint64_t valid = valid_mask(w);
    return {words[1] & valid, words[0] & ~words[1] & valid};
  }

  // Calls visit(context, row, word, keys) for every row and word. One thread visits all rows of a
  // band. Threads take bands as they need them. make_context() makes the context of a thread.
  template <class MakeContext, class Visit>
  void sweep(const MakeContext& make_context, const Visit& visit) const {
    std::atomic<int64_t> taken{0};
    for_ranges(m_ * n_ * rank_ < kSerialProducts ? nullptr : parallel_for_, bands(), [&](int64_t, int64_t) {
      auto&& context = make_context();
      for (int64_t band; (band = taken.fetch_add(1, std::memory_order_relaxed)) < bands();) {
        const int64_t last = std::min(m_, (band + 1) * kBandRows);
        for (int64_t w = 0; w < words_per_row_; ++w)
          for (int64_t row = band * kBandRows; row < last; row += kTileRows) {
            const float* rows[kTileRows];
            for (int i = 0; i < kTileRows; ++i) rows[i] = left_ + std::min(row + i, m_ - 1) * rank_;
            Tile tile;
            loops_.compute_keys(rows, panels_.get() + w * kWordBits * rank_, rank_, tile.keys);
            for (int i = 0; i < std::min<int64_t>(kTileRows, last - row); ++i) visit(context, row + i, w, tile.keys[i]);
          }
      }
    });
  }

 private:
  const float *left_, *right_;
  int64_t m_, n_, rank_, words_per_row_;
  ParallelFor parallel_for_;
  const ProductLoops& loops_;
  std::unique_ptr<float[]> panels_;
};

class Selection {
 public:
  Selection(const Product& product, int64_t m, int64_t n, int64_t k, ParallelFor parallel_for)
      : product_(product),
        m_(m),
        n_(n),
        k_(k),
        parallel_for_(parallel_for),
        words_(m * product.words_per_row()),
        bitmap_(std::make_unique_for_overwrite<uint64_t[]>(size_t(words_))),
        counts_(size_t(product.bands())) {}

  // Selects the entries and stores the k-th key in `threshold`, if that key lies in [low, high).
  // Otherwise returns false, and the bitmap holds nothing of use.
  bool select_in_bracket(uint32_t low, uint32_t high, uint32_t& threshold) {
    if (low >= high) return false;
    const size_t limit = size_t(std::max(2 * k_, kLeastCandidates));
    std::vector<std::vector<uint64_t>> lists;
    std::mutex mutex;
    struct ThreadCandidates {
      std::vector<uint64_t> list;
      std::vector<std::vector<uint64_t>>& all;
      std::mutex& mutex;
      size_t limit;
      ~ThreadCandidates() {
        const std::lock_guard<std::mutex> lock(mutex);
        all.push_back(std::move(list));
      }
    };
    product_.sweep([&] { return ThreadCandidates{{}, lists, mutex, limit}; },
                   [&](ThreadCandidates& found, int64_t row, int64_t w, const uint32_t* keys) {
                     const auto [above, inside] = product_.compare(keys, low, high, w);
                     bitmap_[row * product_.words_per_row() + w] = above;
                     if (found.list.size() > found.limit) return;
                     for (uint64_t rest = inside; rest != 0; rest &= rest - 1) {
                       const int j = std::countr_zero(rest);
                       found.list.push_back(candidate_of(keys[j], row * n_ + w * kWordBits + j));
                     }
                   });
    size_t inside = 0;
    for (const auto& list : lists) inside += list.size();
    const int64_t missing = k_ - count();
    if (missing < 1 || missing > int64_t(inside) || inside > limit) return false;
    const uint64_t smallest = nth_largest(lists, missing, low, high);
    threshold = key_of_candidate(smallest);
    // The candidates of a list lie in bands of its own, so no two threads write to one word.
    const bool serial = inside < size_t(kSerialSamples);
    for_ranges(serial ? nullptr : parallel_for_, int64_t(lists.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (const uint64_t candidate : lists[size_t(i)])
          if (candidate >= smallest) choose(position_of(candidate));
    });
    return true;
  }

  // Finds the k-th key by two histograms, of the upper and of the lower 16 bits. A last sweep then
  // selects the entries. Of those that tie with the k-th key, it takes the first positions.
  uint32_t select_exactly() {
    int64_t above = 0;
    const uint32_t upper = histogram(above, 16, [](uint32_t) { return true; });
    const uint32_t lower = histogram(above, 0, [&](uint32_t key) { return key >> 16 == upper; });
    const uint32_t threshold = (upper << 16) | lower;
    std::vector<uint64_t> ties(static_cast<size_t>(words_));
    product_.sweep([] { return 0; },
                   [&](int, int64_t row, int64_t w, const uint32_t* keys) {
                     const int64_t at = row * product_.words_per_row() + w;
                     const auto [above, inside] = product_.compare(keys, threshold, threshold + 1, w);
                     bitmap_[at] = above;
                     ties[size_t(at)] = inside;
                   });
    int64_t missing = k_ - above;
    for (int64_t at = 0; missing > 0; ++at)
      for (uint64_t rest = ties[size_t(at)]; rest != 0 && missing > 0; rest &= rest - 1, --missing)
        bitmap_[at] |= rest & -rest;
    count();
    return threshold;
  }

  // Writes the positions of the set bits in order.
  void write_indices(int32_t* indices) const {
    std::vector<int64_t> first(size_t(product_.bands()) + 1);
    std::partial_sum(counts_.begin(), counts_.end(), first.begin() + 1);
    for_ranges(k_ < kSerialCopies ? nullptr : parallel_for_, product_.bands(), [&](int64_t begin, int64_t end) {
      int32_t* out = indices + first[size_t(begin)];
      const int32_t* const last = indices + first[size_t(end)];
      for (int64_t row = begin * kBandRows; row < std::min(m_, end * kBandRows); ++row)
        out = list_bits(bitmap_.get() + row * product_.words_per_row(), product_.words_per_row(), row * n_, out, last);
    });
  }

 private:
  void choose(uint32_t position) {
    const uint32_t row = position / uint32_t(n_), column = position % uint32_t(n_);
    bitmap_[row * product_.words_per_row() + column / kWordBits] |= uint64_t{1} << (column % kWordBits);
    ++counts_[row / kBandRows];
  }

  // Counts the bits of every band, and returns their sum.
  int64_t count() {
    const int64_t words = kBandRows * product_.words_per_row();
    for_ranges(words_ < kSerialCopies ? nullptr : parallel_for_, product_.bands(), [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band)
        counts_[size_t(band)] = count_bits(bitmap_.get() + band * words, std::min(words, words_ - band * words));
    });
    return std::accumulate(counts_.begin(), counts_.end(), int64_t{0});
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
                     const auto columns = int(std::min<int64_t>(kWordBits, n_ - w * kWordBits));
                     for (int j = 0; j < columns; ++j)
                       if (wanted(keys[j])) ++mine.own[(keys[j] >> shift) & 0xffffu];
                   });
    uint32_t bin = 0xffffu;
    for (; above + bins[bin] < k_; --bin) above += bins[bin];
    return bin;
  }

  const Product& product_;
  int64_t m_, n_, k_;
  ParallelFor parallel_for_;
  int64_t words_;
  std::unique_ptr<uint64_t[]> bitmap_;  // row-major words
  std::vector<int64_t> counts_;         // bits of each band
};

uint32_t key_of(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffffu; }

struct Bracket {
  uint32_t low, high;
};

// Predicts the k-th key from quantiles of sampled entries, one from each of S equal stretches of the
// matrix. Entries of whole tiles would be correlated. The same factors give the same bracket.
Bracket sampled_bracket(const Product& product, int64_t numel, int64_t k, ParallelFor parallel_for) {
  const int64_t count = std::min(numel, std::clamp(numel / kSampled, kLeastSamples, kMostSamples));
  std::vector<uint32_t> keys(static_cast<size_t>(count));
  for_ranges(count < kSerialSamples ? nullptr : parallel_for, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i * numel / count, length = (i + 1) * numel / count - start;
      keys[size_t(i)] = key_of(product.magnitude(start + counter_hash(uint32_t(i)) % length));
    }
  });
  const double share = double(k) / double(numel);
  const double spread = kDeviations * std::sqrt(share * (1 - share) / double(count));
  const auto low = int64_t((1 - share - spread) * double(count)) - 1;
  const auto high = int64_t((1 - share + spread) * double(count)) + 2;
  Bracket bracket{0, key_of(std::numeric_limits<float>::infinity())};
  if (high < count) {
    std::nth_element(keys.begin(), keys.begin() + high, keys.end());
    bracket.high = keys[size_t(high)];
  }
  if (low >= 0) {  // Everything up to `high` is no larger.
    std::nth_element(keys.begin(), keys.begin() + low, high < count ? keys.begin() + high : keys.end());
    bracket.low = keys[size_t(low)];
  }
  return bracket;
}

}  // namespace

float lowrank_topk_cpu(const float* left, const float* right, int64_t m, int64_t n, int64_t rank, int64_t k, float low,
                       float high, int32_t* indices, ParallelFor parallel_for) {
  const Product product(left, right, m, n, rank, parallel_for);
  Selection selection(product, m, n, k, parallel_for);
  const Bracket bracket = std::isnan(low) ? sampled_bracket(product, m * n, k, parallel_for)
                                          : Bracket{key_of(low), key_of(high)};
  uint32_t threshold = 0;
  if (!selection.select_in_bracket(bracket.low, bracket.high, threshold)) threshold = selection.select_exactly();
  selection.write_indices(indices);
  return std::bit_cast<float>(threshold);
}

}  // namespace lift
