// Moves the segments of many matrices to new index lists, in place, on the CPU.
//
// Matrices go in groups. One merge of the old and the new lists of a group gives every new entry
// its old position. Then each arena in turn is taken into scratch and copied back. So the lists are
// read once for all arenas, and the scratch of 8 bytes an entry stays in the caches.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../launchers.h"
#include "dtypes.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int64_t kGroup = 1 << 20;  // new entries of a group, unless one matrix has more

// New entries begin .. end of a matrix. Their scratch starts at `at`.
struct Chunk {
  const Migration* matrix;
  int64_t begin, end, at;
  int64_t kept;
};

// Writes the old position of every new entry of a chunk, or -1 for an entry that enters. Returns
// how many were there before.
int64_t merge(const Chunk& chunk, const int32_t* arena, int32_t* positions) {
  const int32_t* const fresh = chunk.matrix->new_indices;
  const int32_t* const first = arena + chunk.matrix->offset;
  const int32_t* const last = first + chunk.matrix->old_count;
  const int32_t* at = std::lower_bound(first, last, fresh[chunk.begin]);
  int64_t kept = 0;
  for (int64_t j = chunk.begin; j < chunk.end; ++j) {
    while (at < last && *at < fresh[j]) ++at;
    const bool stays = at < last && *at == fresh[j];
    positions[j - chunk.begin] = stays ? int32_t(at - first) : -1;
    kept += stays;
  }
  return kept;
}

// out[j] = the value at the old position, or entering(j) for an entry without one.
template <class T, class Entering>
void take(const T* old, const int32_t* positions, int64_t count, T* out, const Entering& entering) {
  for (int64_t j = 0; j < count; ++j) out[j] = positions[j] >= 0 ? old[positions[j]] : entering(j);
}

// The chunks of a group of matrices, and scratch for their entries. Chunks are dealt out in runs of
// about kChunk entries, so that a group of tiny matrices wakes no thread.
class Group {
 public:
  Group(std::vector<Chunk> chunks, int32_t* positions, void* values, ParallelFor parallel_for)
      : chunks_(std::move(chunks)), positions_(positions), values_(values), parallel_for_(parallel_for) {
    int64_t end = 0;  // of the scratch of the last run
    for (size_t c = 0; c < chunks_.size(); ++c) {
      if (c == 0 || chunks_[c].at + (chunks_[c].end - chunks_[c].begin) > end) {
        runs_.push_back(c);
        end = chunks_[c].at + kChunk;
      }
    }
    runs_.push_back(chunks_.size());
  }

  void find(const int32_t* indices, const Migration* matrices, int64_t* kept) {
    each([&](Chunk& chunk) { chunk.kept = merge(chunk, indices, positions_ + chunk.at); });
    for (const Chunk& chunk : chunks_) kept[chunk.matrix - matrices] += chunk.kept;
  }

  // `entering` is a function of the chunk and the place in it.
  template <class T, class Entering>
  void move(T* arena, const Entering& entering) {
    T* const values = static_cast<T*>(values_);
    each([&](Chunk& chunk) {
      take(arena + chunk.matrix->offset, positions_ + chunk.at, chunk.end - chunk.begin, values + chunk.at,
           [&](int64_t j) { return T(entering(chunk, j)); });
    });
    each([&](Chunk& chunk) { put(chunk, values + chunk.at, arena); });
  }

  void write_lists(int32_t* indices) {
    each([&](Chunk& chunk) { put(chunk, chunk.matrix->new_indices + chunk.begin, indices); });
  }

 private:
  template <class T>
  static void put(const Chunk& chunk, const T* values, T* arena) {
    std::memcpy(arena + chunk.matrix->offset + chunk.begin, values, size_t(chunk.end - chunk.begin) * sizeof(T));
  }

  template <class F>
  void each(const F& work) {
    for_ranges(parallel_for_, int64_t(runs_.size()) - 1, [&](int64_t begin, int64_t end) {
      for (size_t c = runs_[begin]; c < runs_[end]; ++c) work(chunks_[c]);
    });
  }

  std::vector<Chunk> chunks_;
  std::vector<size_t> runs_;  // the first chunk of each run, and the number of chunks
  int32_t* positions_;
  void* values_;
  ParallelFor parallel_for_;
};

template <class W, class M>
void move_group(Group& group, const MigrationArenas& arenas) {
  const auto zero = [](const Chunk&, int64_t) { return 0; };
  group.move(static_cast<M*>(arenas.exp_avg), zero);
  group.move(static_cast<M*>(arenas.exp_avg_sq), zero);
  if (arenas.master != nullptr)
    group.move(arenas.master, [](const Chunk& chunk, int64_t j) {
      const auto* weight = static_cast<const typename W::Storage*>(chunk.matrix->weight);
      return W::widen(weight[chunk.matrix->new_indices[chunk.begin + j]]);
    });
  if (arenas.births != nullptr)
    group.move(arenas.births, [](const Chunk& chunk, int64_t) { return chunk.matrix->step; });
  group.write_lists(arenas.indices);
}

// The last matrix of the group that starts at `first`, exclusive, and its new entries.
std::pair<int64_t, int64_t> group_end(const Migration* matrices, int64_t n, int64_t first) {
  int64_t entries = matrices[first].new_count, last = first + 1;
  while (last < n && entries + matrices[last].new_count <= kGroup) entries += matrices[last++].new_count;
  return {last, entries};
}

}  // namespace

void arena_migrate_cpu(const Migration* matrices, int64_t n, const MigrationArenas& arenas, DType weight,
                       int moment_width, int64_t* kept, ParallelFor parallel_for) {
  int64_t largest = 0;
  for (int64_t first = 0; first < n;) {
    const auto [last, entries] = group_end(matrices, n, first);
    largest = std::max(largest, entries);
    first = last;
  }
  // Without a value, so that only the pages that are used are touched.
  const std::unique_ptr<int32_t[]> positions(new int32_t[largest]), values(new int32_t[largest]);
  std::fill_n(kept, n, 0);
  for (int64_t first = 0; first < n;) {
    const int64_t last = group_end(matrices, n, first).first;
    std::vector<Chunk> chunks;
    int64_t at = 0;
    for (; first < last; ++first) {
      const Migration& matrix = matrices[first];
      for (int64_t begin = 0; begin < matrix.new_count; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, matrix.new_count);
        chunks.push_back({&matrix, begin, end, at, 0});
        at += end - begin;
      }
    }
    Group group(std::move(chunks), positions.get(), values.get(), parallel_for);
    group.find(arenas.indices, matrices, kept);
    dispatch_dtype(weight, [&](auto type) {
      if (moment_width == 4) move_group<decltype(type), uint32_t>(group, arenas);
      else move_group<decltype(type), uint16_t>(group, arenas);
    });
  }
}

}  // namespace lift
