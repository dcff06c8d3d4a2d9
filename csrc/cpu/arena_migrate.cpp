// Moves the segments of many matrices to new index lists, in place, on the CPU.
//
// Matrices go in batches, and the lists of a batch in chunks. One merge of the old and the new list
// says where the entries of a chunk come from, and all arenas are taken into scratch. A matrix of
// one chunk is put back at once, while it is in the caches. The others wait until all of the batch
// is taken. So threads meet twice a batch at most, and not at all for tiny matrices, which one
// thread moves faster than it could wake another.
#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../launchers.h"
#include "dtypes.h"
#include "levels.h"
#include "moment_codes.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int64_t kTogether = 1 << 20;  // new entries that are moved together, unless one matrix has more
static_assert(kChunk % kGroup == 0, "no group of 8-bit moments may reach into two chunks");

// New entries begin .. end of a matrix. Their scratch starts at entry `at`.
struct Chunk {
  const Migration* matrix;
  int64_t begin, end, at, kept;

  int64_t count() const { return end - begin; }
  bool is_whole() const { return count() == matrix->new_count; }
  const int32_t* list() const { return matrix->new_indices + begin; }
  int64_t segment() const { return matrix->offset; }
};

// Where the new entries of a chunk come from.
struct Merged {
  int32_t position[kChunk];  // in the old list; for an entry that enters, of any other entry
  int32_t entering[kChunk];  // places in the chunk of the entries that enter
  int64_t enters = 0;
};

// Merges the lists without a branch in the loop, because it could not be predicted. With branches,
// 224 lists of 204 entries, of which a quarter enters, took 1.8 ms on one thread instead of 1.1 ms.
void merge(const Chunk& chunk, const int32_t* indices, Merged& merged) {
  const int32_t *const list = chunk.list(), *const old = indices + chunk.segment();
  const int64_t last = chunk.matrix->old_count, count = chunk.count();
  int64_t at = std::lower_bound(old, old + last, list[0]) - old, j = 0, enters = 0;
  while (at < last && j < count) {
    const int32_t before = old[at], now = list[j];
    merged.position[j] = int32_t(at);
    merged.entering[enters] = int32_t(j);
    enters += now < before;
    at += before <= now;
    j += now <= before;
  }
  for (; j < count; ++j) {
    merged.position[j] = 0;
    merged.entering[enters++] = int32_t(j);
  }
  merged.enters = enters;
}

// Copies old(position) of the entries that stay, and puts value(j) for each entry that enters.
template <class T, class Old, class Value>
void take(const Old& old, const Merged& merged, int64_t count, T* out, const Value& value) {
  if (merged.enters < count)
    for (int64_t j = 0; j < count; ++j) out[j] = old(merged.position[j]);
  for (int64_t e = 0; e < merged.enters; ++e) out[merged.entering[e]] = value(merged.entering[e]);
}

// The arenas, with scratch for the entries of a batch. W is the format of weights, and M stores a
// moment. 8-bit moments are taken as fp32: other entries share their groups afterwards.
template <class W, class M>
class Arenas {
  static constexpr bool kCoded = std::is_same_v<M, int8_t>;
  using Taken = std::conditional_t<kCoded, float, M>;

 public:
  Arenas(const MigrationArenas& arenas, int64_t scratch)
      : to_(arenas),
        exp_avg_(new Taken[scratch]),
        exp_avg_sq_(new Taken[scratch]),
        master_(new float[arenas.master != nullptr ? scratch : 0]),
        master_low_(new int16_t[arenas.master_low != nullptr ? scratch : 0]),
        births_(new int32_t[arenas.births != nullptr ? scratch : 0]) {}

  // Returns how many entries stay.
  int64_t take_chunk(const Chunk& chunk) const {
    Merged merged;
    merge(chunk, to_.indices, merged);
    const int64_t count = chunk.count(), old = chunk.segment();
    const auto stored = [=](const auto* arena) { return [=](int32_t position) { return arena[old + position]; }; };
    const auto zero = [](int32_t) { return 0; };
    if constexpr (kCoded) {
      const auto decoded = [=](const auto* codes, const float* scales) {
        return [=](int32_t p) { return cube(codes[old + p]) * scales[(old + p) / kGroup]; };
      };
      const auto first = decoded(static_cast<const int8_t*>(to_.exp_avg), to_.exp_avg_scale);
      const auto root = decoded(static_cast<const uint8_t*>(to_.exp_avg_sq), to_.exp_avg_sq_scale);
      take(first, merged, count, exp_avg_.get() + chunk.at, zero);
      take(root, merged, count, exp_avg_sq_.get() + chunk.at, zero);
    } else {
      take(stored(static_cast<const M*>(to_.exp_avg)), merged, count, exp_avg_.get() + chunk.at, zero);
      take(stored(static_cast<const M*>(to_.exp_avg_sq)), merged, count, exp_avg_sq_.get() + chunk.at, zero);
    }
    if (to_.master != nullptr) {
      const auto* weight = static_cast<const typename W::Storage*>(chunk.matrix->weight);
      const auto exact = [=, list = chunk.list()](int32_t j) { return W::widen(weight[list[j]]); };
      take(stored(to_.master), merged, count, master_.get() + chunk.at, exact);
    }
    if (to_.master_low != nullptr) take(stored(to_.master_low), merged, count, master_low_.get() + chunk.at, zero);
    if (to_.births != nullptr) {
      const auto step = [&](int32_t) { return chunk.matrix->step; };
      take(stored(to_.births), merged, count, births_.get() + chunk.at, step);
    }
    return count - merged.enters;
  }

  void put_chunk(const Chunk& chunk) const {
    if constexpr (kCoded) {
      const int64_t to = chunk.segment() + chunk.begin, group = to / kGroup;
      const Codes codes{static_cast<int8_t*>(to_.exp_avg) + to, static_cast<uint8_t*>(to_.exp_avg_sq) + to,
                        to_.exp_avg_scale + group, to_.exp_avg_sq_scale + group, 0, 0};
      step_loops().encode(exp_avg_.get() + chunk.at, exp_avg_sq_.get() + chunk.at, codes, int(chunk.count()));
    } else {
      put(chunk, exp_avg_.get() + chunk.at, static_cast<M*>(to_.exp_avg));
      put(chunk, exp_avg_sq_.get() + chunk.at, static_cast<M*>(to_.exp_avg_sq));
    }
    if (to_.master != nullptr) put(chunk, master_.get() + chunk.at, to_.master);
    if (to_.master_low != nullptr) put(chunk, master_low_.get() + chunk.at, to_.master_low);
    if (to_.births != nullptr) put(chunk, births_.get() + chunk.at, to_.births);
    put(chunk, chunk.list(), to_.indices);
  }

 private:
  template <class T>
  static void put(const Chunk& chunk, const T* values, T* arena) {
    std::memcpy(arena + chunk.segment() + chunk.begin, values, size_t(chunk.count()) * sizeof(T));
  }

  const MigrationArenas& to_;
  // Not initialized, so that only pages that are used are touched.
  std::unique_ptr<Taken[]> exp_avg_, exp_avg_sq_;
  std::unique_ptr<float[]> master_;
  std::unique_ptr<int16_t[]> master_low_;
  std::unique_ptr<int32_t[]> births_;
};

// Adds matrices from `first` on, up to kTogether entries together or one larger matrix. Returns the
// first one that is left.
int64_t fill_batch(const Migration* matrices, int64_t first, int64_t n, std::vector<Chunk>& chunks) {
  int64_t at = 0;
  chunks.clear();
  for (; first < n && (at == 0 || at + matrices[first].new_count <= kTogether); ++first) {
    for (int64_t begin = 0; begin < matrices[first].new_count; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, matrices[first].new_count);
      chunks.push_back({matrices + first, begin, end, at, 0});
      at += end - begin;
    }
  }
  return first;
}

// Calls work(chunk) for all chunks. A thread takes about kChunk entries or more at once.
template <class F>
void for_chunks(ParallelFor parallel_for, std::vector<Chunk>& chunks, const F& work) {
  std::vector<size_t> runs;
  for (size_t c = 0; c < chunks.size(); ++c)
    if (runs.empty() || chunks[c].at + chunks[c].count() > chunks[runs.back()].at + kChunk) runs.push_back(c);
  runs.push_back(chunks.size());
  for_ranges(parallel_for, int64_t(runs.size()) - 1, [&](int64_t begin, int64_t end) {
    for (size_t c = runs[begin]; c < runs[end]; ++c) work(chunks[c]);
  });
}

template <class W, class M>
void migrate_all(const Migration* matrices, int64_t n, const MigrationArenas& arenas, int64_t* kept,
                 ParallelFor parallel_for) {
  int64_t entries = 0, largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    entries += matrices[i].new_count;
    largest = std::max(largest, matrices[i].new_count);
    kept[i] = 0;
  }
  const Arenas<W, M> moved(arenas, std::max(largest, std::min(entries, kTogether)));
  std::vector<Chunk> chunks;
  for (int64_t first = 0; first < n;) {
    first = fill_batch(matrices, first, n, chunks);
    for_chunks(parallel_for, chunks, [&](Chunk& chunk) {
      chunk.kept = moved.take_chunk(chunk);
      if (chunk.is_whole()) moved.put_chunk(chunk);
    });
    for (const Chunk& chunk : chunks) kept[chunk.matrix - matrices] += chunk.kept;
    std::erase_if(chunks, [](const Chunk& chunk) { return chunk.is_whole(); });
    if (!chunks.empty()) for_chunks(parallel_for, chunks, [&](const Chunk& chunk) { moved.put_chunk(chunk); });
  }
}

}  // namespace

void arena_migrate_cpu(const Migration* matrices, int64_t n, const MigrationArenas& arenas, DType weight, DType moment,
                       int64_t* kept, ParallelFor parallel_for) {
  dispatch_dtype(weight, [&](auto type) {
    using W = decltype(type);
    if (moment == DType::f32) migrate_all<W, uint32_t>(matrices, n, arenas, kept, parallel_for);
    else if (moment == DType::code8) migrate_all<W, int8_t>(matrices, n, arenas, kept, parallel_for);
    else migrate_all<W, uint16_t>(matrices, n, arenas, kept, parallel_for);
  });
}

}  // namespace lift
