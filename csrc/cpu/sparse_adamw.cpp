// The sparse AdamW step on the CPU.
//
// The entries are processed in blocks of kBlock. A block gathers its weights and gradients into
// buffers that stay in L1, updates them with plain vector loops, and scatters the weights back.
// The speed depends on how many of the scattered cache lines are in flight at once. Of the variants
// timed on a 2-core AMD EPYC, these choices were the fastest:
// - Cache lines are prefetched kPrefetchDistance blocks ahead, across the ends of matrices. They go
//   into L2, which was a quarter faster than L1.
// - The packed streams are prefetched too, which gained 2 to 8 %. The hardware prefetcher also
//   follows them, but presumably only up to the end of a page.
// - The prefetches are spread over the gather loop (gradients) and the scatter loop (weights).
//   Issued in one burst, they stall the loop that issues them.
// - Within a block, both loops visit the entries in a strided order. The gain presumably comes from
//   the hardware prefetcher: it sees no stream and fetches no unwanted lines.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../launchers.h"
#include "adamw_update.h"
#include "dtypes.h"
#include "guided_schedule.h"
#include "levels.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int kStride = 37;               // odd, so every entry of a block is visited
constexpr int64_t kPrefetchDistance = 8;  // blocks
constexpr int kPrefetchToL2 = 2;          // the locality argument of __builtin_prefetch
constexpr int kCacheLine = 64;            // bytes

// Calls work(j) for j < n and prefetch(j) for j < prefetches. For full blocks the two calls
// alternate and j advances by kStride.
template <class Work, class Prefetch>
[[gnu::always_inline]] inline void interleave(int n, const Work& work, int prefetches, const Prefetch& prefetch) {
  if (n == kBlock && prefetches == kBlock) {
    for (int i = 0; i < kBlock; ++i) {
      const int j = (i * kStride) % kBlock;
      prefetch(j);
      work(j);
    }
    return;
  }
  for (int j = 0; j < n; ++j) work(j);
  for (int j = 0; j < prefetches; ++j) prefetch(j);
}

static_assert(kBlock % kGroup == 0, "no group may reach into two blocks");

// How 8-bit moments are stored.
struct Code8 {
  static constexpr int number = int(DType::code8);
  using Storage = int8_t;
};

// kBlock entries on the stack.
template <class T>
struct Buffer {
  alignas(64) T data[kBlock];
};

template <class W, class G, class M>
class Step {
  using WS = typename W::Storage;
  using GS = typename G::Storage;
  using MS = typename M::Storage;  // of one moment
  static constexpr bool kCoded = M::number == int(DType::code8);

 public:
  Step(const AdamW& adamw, const Segment* segments, const Scalars* scalars)
      : a_(adamw), segments_(segments), scalars_(scalars), loops_(step_loops()) {}

  // Processes all blocks that `schedule` gives to this thread.
  void run(GuidedSchedule schedule) const {
    Block ring[kPrefetchDistance];
    int64_t prefetched = 0;
    for (Block block; prefetched < kPrefetchDistance && schedule.next(block); ++prefetched) {
      const int32_t* index = index_of(block);
      for (int j = 0; j < block.n && !a_.packed_weights; ++j) prefetch_weight(block, index, j);
      for (int j = 0; j < block.n && !a_.packed_grads; ++j) prefetch_grad(block, index, j);
      ring[prefetched] = block;
    }
    for (int64_t done = 0; done < prefetched; ++done) {
      const Block now = ring[done % kPrefetchDistance];
      Block later{segments_, 0, 0};
      if (schedule.next(later)) ring[prefetched++ % kPrefetchDistance] = later;
      step(now, later);
    }
  }

 private:
  const int32_t* index_of(const Block& block) const { return a_.indices + block.segment->offset + block.at; }

  // Prefetch entry j of a block. A weight that has a master is only written, but its cache line
  // must still be read. Inlining is forced because GCC considers a function that only prefetches to
  // be free of side effects and has dropped calls to one.
  [[gnu::always_inline]] void prefetch_grad(const Block& block, const int32_t* index, int j) const {
    __builtin_prefetch(static_cast<const GS*>(block.segment->grad) + index[j], 0, kPrefetchToL2);
  }
  [[gnu::always_inline]] void prefetch_weight(const Block& block, const int32_t* index, int j) const {
    __builtin_prefetch(static_cast<const WS*>(block.segment->weight) + index[j], 1, kPrefetchToL2);
  }

  // Prefetches the packed streams of a block.
  [[gnu::always_inline]] void prefetch_streams(const Block& block) const {
    const int64_t arena = block.segment->offset + block.at;
    prefetch_stream<1>(static_cast<const MS*>(a_.exp_avg) + arena, block.n);
    prefetch_stream<1>(static_cast<const MS*>(a_.exp_avg_sq) + arena, block.n);
    if (a_.master != nullptr) prefetch_stream<1>(a_.master + arena, block.n);
    if (a_.master_low != nullptr) prefetch_stream<1>(a_.master_low + arena, block.n);
    if (a_.packed_weights) prefetch_stream<1>(static_cast<const WS*>(block.segment->weight) + block.at, block.n);
    if (a_.births != nullptr) prefetch_stream<0>(a_.births + arena, block.n);
    if (a_.packed_grads) prefetch_stream<0>(static_cast<const GS*>(block.segment->grad) + block.at, block.n);
  }
  template <int write, class T>
  [[gnu::always_inline]] static void prefetch_stream(const T* entries, int n) {
    for (int j = 0; j < n; j += kCacheLine / int(sizeof(T))) __builtin_prefetch(entries + j, write, kPrefetchToL2);
  }

  void step(const Block& block, const Block& later) const {
    const Segment& s = *block.segment;
    const int n = block.n;
    const int64_t arena = s.offset + block.at;
    const int32_t* index = a_.indices + arena;
    WS* weight = static_cast<WS*>(s.weight);
    const GS* grad = static_cast<const GS*>(s.grad);
    Buffer<WS> w_raw;
    Buffer<GS> g_raw;
    Buffer<float> w_wide, g_wide;

    const int32_t* later_index = index_of(later);
    const auto prefetch_g = [&](int j) __attribute__((always_inline)) { prefetch_grad(later, later_index, j); };
    const auto prefetch_w = [&](int j) __attribute__((always_inline)) { prefetch_weight(later, later_index, j); };
    const auto gather_w = [&](int j) { w_raw.data[j] = weight[index[j]]; };
    const auto gather_g = [&](int j) { g_raw.data[j] = grad[index[j]]; };
    const auto gather_both = [&](int j) {
      gather_w(j);
      gather_g(j);
    };
    const bool gathers_w = a_.master == nullptr && !a_.packed_weights;
    if (!a_.packed_grads && gathers_w) interleave(n, gather_both, later.n, prefetch_g);
    else if (!a_.packed_grads) interleave(n, gather_g, later.n, prefetch_g);
    else if (gathers_w) interleave(n, gather_w, n, [](int) {});

    WS* const stored = a_.packed_weights ? weight + block.at : w_raw.data;
    float* w = a_.master != nullptr ? a_.master + arena : w_wide.data;
    if (a_.master_low != nullptr) loops_.join(stored, a_.master_low + arena, w, n);
    else if (a_.master == nullptr) w = widened<W>(stored, w_wide.data, n);
    const float* g = widened<G>(a_.packed_grads ? grad + block.at : g_raw.data, g_wide.data, n);

    prefetch_streams(later);
    const Scalars& scalars = scalars_[block.segment - segments_];
    if (a_.births == nullptr) {
      update(w, arena, g, n, scalars);
    } else {
      Buffer<float> inv_bc1, inv_sqrt_bc2;
      for (int j = 0; j < n; ++j) {
        const int64_t age = std::clamp<int64_t>(int64_t(s.step) - a_.births[arena + j], 0, a_.bias_ages);
        inv_bc1.data[j] = a_.bias_table[age];
        inv_sqrt_bc2.data[j] = a_.bias_table[a_.bias_ages + 1 + age];
      }
      update(w, arena, g, n, scalars, inv_bc1.data, inv_sqrt_bc2.data);
    }

    const WS* rounded = stored;
    if constexpr (sizeof(WS) == 4) {
      rounded = w;
      if (a_.packed_weights && a_.master != nullptr) std::copy_n(w, n, stored);
    } else if (a_.master_low != nullptr) loops_.split(w, stored, a_.master_low + arena, n);
    else if (a_.stochastic) loops_.round_stochastic[W::number](w, stored, n, uint32_t(arena), scalars.key);
    else loops_.round_nearest[W::number](w, stored, n);
    if (!a_.packed_weights) interleave(n, [&](int j) { weight[index[j]] = rounded[j]; }, later.n, prefetch_w);
  }

  // Updates fp32 weights and the moments from an arena position on. `bias` is empty, or has both
  // corrections of each entry.
  template <class... Bias>
  void update(float* w, int64_t arena, const float* g, int n, const Scalars& scalars, Bias... bias) const {
    constexpr bool per_entry = sizeof...(Bias) > 0;
    if constexpr (kCoded) {
      const int64_t group = arena / kGroup;
      const Codes codes{static_cast<int8_t*>(a_.exp_avg) + arena, static_cast<uint8_t*>(a_.exp_avg_sq) + arena,
                        a_.exp_avg_scale + group, a_.exp_avg_sq_scale + group, uint32_t(arena), scalars.dither};
      if constexpr (per_entry) loops_.update_codes_per_entry(w, codes, g, n, scalars, bias...);
      else loops_.update_codes(w, codes, g, n, scalars);
    } else {
      MS* m = static_cast<MS*>(a_.exp_avg) + arena;
      MS* v = static_cast<MS*>(a_.exp_avg_sq) + arena;
      if constexpr (per_entry) loops_.update_per_entry[M::number](w, m, v, g, n, scalars, bias...);
      else loops_.update[M::number](w, m, v, g, n, scalars);
    }
  }

  // Returns fp32 entries where they are stored. Widens other types into `buffer`.
  template <class T, class Stored>
  auto widened(Stored* stored, float* buffer, int n) const {
    if constexpr (sizeof(Stored) == 4) {
      return stored;
    } else {
      loops_.widen[T::number](stored, buffer, n);
      return buffer;
    }
  }

  const AdamW& a_;
  const Segment* segments_;
  const Scalars* scalars_;  // one per segment
  const StepLoops& loops_;
};

template <class W, class G, class M>
void step_all(const Segment* segments, int64_t n, const AdamW& adamw, ParallelFor parallel_for) {
  int64_t blocks = 0;
  std::vector<Scalars> scalars;
  scalars.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    blocks += block_count(segments[i]);
    // Most matrices have the same step count, and powers in fp64 take longer than a small matrix.
    if (i > 0 && segments[i].step == segments[i - 1].step) scalars.push_back(scalars.back());
    else scalars.emplace_back(adamw, segments[i].step);
  }
  const Step<W, G, M> step(adamw, segments, scalars.data());
  std::atomic<int64_t> taken{0};
  for_ranges(parallel_for, blocks, [&](int64_t begin, int64_t end) {
    const int64_t range = end - begin, threads = (blocks + range - 1) / range;
    step.run(GuidedSchedule(segments, blocks, threads, taken));
  });
}

template <class W, class G>
void dispatch_moment(const Segment* segments, int64_t n, const AdamW& adamw, DType moment, ParallelFor parallel_for) {
  if (moment == DType::f32) step_all<W, G, F32>(segments, n, adamw, parallel_for);
  else if (moment == DType::code8) step_all<W, G, Code8>(segments, n, adamw, parallel_for);
  else step_all<W, G, BF16>(segments, n, adamw, parallel_for);
}

template <class W>
void dispatch_grad(const Segment* segments, int64_t n, const AdamW& adamw, DType grad, DType moment,
                   ParallelFor parallel_for) {
  if (grad == DType::f32) dispatch_moment<W, F32>(segments, n, adamw, moment, parallel_for);
  else if (grad == DType::bf16) dispatch_moment<W, BF16>(segments, n, adamw, moment, parallel_for);
  else dispatch_moment<W, F16>(segments, n, adamw, moment, parallel_for);
}

}  // namespace

void sparse_adamw_cpu(const Segment* segments, int64_t n, const AdamW& adamw, DType weight, DType grad, DType moment,
                      ParallelFor parallel_for) {
  if (weight == DType::f32) dispatch_grad<F32>(segments, n, adamw, grad, moment, parallel_for);
  else if (weight == DType::bf16) dispatch_grad<BF16>(segments, n, adamw, grad, moment, parallel_for);
  else dispatch_grad<F16>(segments, n, adamw, grad, moment, parallel_for);
}

}  // namespace lift
