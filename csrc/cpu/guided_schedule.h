// Distributes the blocks of entries of a CPU step over the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../launchers.h"

namespace lift {

constexpr int kBlock = 128;      // entries per block
constexpr int64_t kMinRun = 64;  // blocks in the shortest run

// Entries at .. at + n of the index list of a segment.
struct Block {
  const Segment* segment;
  int64_t at;
  int n;
};

inline int64_t block_count(const Segment& segment) { return (segment.count + kBlock - 1) / kBlock; }

// Walks over the blocks of all segments, as OpenMP's schedule(guided) does. Each thread takes runs
// of blocks as it needs them, so a thread that starts late or shares its core takes fewer. The
// length of a run is half of a thread's equal share of the remaining blocks, and at least kMinRun.
// With runs of kMinRun throughout, a step took up to 6 % longer. With shorter runs it took up to
// 50 % longer, because cores that work on neighboring memory disturb each other.
class GuidedSchedule {
 public:
  GuidedSchedule(const Segment* segments, int64_t blocks, int64_t threads, std::atomic<int64_t>& taken)
      : segment_(segments), blocks_(blocks), threads_(threads), taken_(taken) {}

  // Returns false when no run is left.
  bool next(Block& block) {
    if (at_ == end_ && !take_run()) return false;
    for (; at_ - first_ >= block_count(*segment_); ++segment_) first_ += block_count(*segment_);
    const int64_t entry = (at_ - first_) * kBlock;
    block = {segment_, entry, int(std::min<int64_t>(kBlock, segment_->count - entry))};
    ++at_;
    return true;
  }

 private:
  bool take_run() {
    at_ = taken_.load(std::memory_order_relaxed);
    do {
      const int64_t left = blocks_ - at_;
      end_ = at_ + std::min(left, std::max(kMinRun, left / (2 * threads_)));
    } while (!taken_.compare_exchange_weak(at_, end_, std::memory_order_relaxed));
    return at_ < end_;
  }

  const Segment* segment_;
  int64_t first_ = 0;         // number of the first block of the segment
  int64_t at_ = 0, end_ = 0;  // the remaining blocks of the run
  const int64_t blocks_, threads_;
  std::atomic<int64_t>& taken_;
};

}  // namespace lift
