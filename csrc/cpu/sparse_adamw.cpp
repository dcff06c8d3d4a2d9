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
#include <cmath>
#include <vector>

#include "../launchers.h"
#include "guided_schedule.h"
#include "dtypes.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int kStride = 37;               // odd, so every entry of a block is visited
constexpr int64_t kPrefetchDistance = 8;  // blocks
constexpr int kPrefetchToL2 = 2;          // the locality argument of __builtin_prefetch
constexpr int kCacheLine = 64;            // bytes

// Scalars of the update of one matrix. They are formed in fp64 and then rounded to fp32. Forming
// 1 - beta2 in fp32 would triple the error.
struct Scalars {
  float one_minus_beta1, beta2, one_minus_beta2, eps, decay, grad_factor;
  float step_size;     // lr / bc1, or lr if each entry has its own bias correction
  float inv_sqrt_bc2;  // 1 / sqrt(bc2)
  uint32_t key;        // of stochastic rounding, from the seed and the step

  Scalars(const AdamW& a, float step)
      : one_minus_beta1(float(1 - a.beta1)),
        beta2(float(a.beta2)),
        one_minus_beta2(float(1 - a.beta2)),
        eps(float(a.eps)),
        decay(float(1 - a.lr * a.weight_decay)),
        grad_factor(a.grad_factor),
        step_size(float(a.births != nullptr ? a.lr : a.lr / (1 - std::pow(a.beta1, double(step))))),
        inv_sqrt_bc2(float(1 / std::sqrt(1 - std::pow(a.beta2, double(step))))),
        key(counter_hash(counter_hash(a.seed) ^ uint32_t(int64_t(step)))) {}
};

struct Moments {
  float m, v;
};

// Updates the stored moments of one entry. Returns the new moments before they are rounded.
template <class M, class MS = typename M::Storage>
[[gnu::always_inline]] inline Moments update_moments(MS& m_stored, MS& v_stored, float g, const Scalars& s) {
  // This is torch's lerp. It is exact at both ends, so beta1 = 0 gives the gradient itself.
  const float m_old = M::widen(m_stored);
  const bool near = s.one_minus_beta1 < 0.5f;
  const float m = (near ? m_old : g) + (near ? s.one_minus_beta1 : s.one_minus_beta1 - 1.0f) * (g - m_old);
  const float v = s.beta2 * M::widen(v_stored) + s.one_minus_beta2 * g * g;
  m_stored = M::round(m);
  v_stored = M::round(v);
  return {m, v};
}

// Updates w and the moments of n entries.
template <class M, class MS = typename M::Storage>
LIFT_CLONES void update(float* __restrict w, MS* __restrict m_stored, MS* __restrict v_stored,
                        const float* __restrict g, int n, Scalars s) {
  for (int j = 0; j < n; ++j) {
    const Moments now = update_moments<M>(m_stored[j], v_stored[j], g[j] * s.grad_factor, s);
    w[j] = w[j] * s.decay - s.step_size * now.m / (__builtin_sqrtf(now.v) * s.inv_sqrt_bc2 + s.eps);
  }
}

// Does the same with a bias correction for the age of each entry.
template <class M, class MS = typename M::Storage>
LIFT_CLONES void update_per_entry(float* __restrict w, MS* __restrict m_stored, MS* __restrict v_stored,
                                  const float* __restrict g, int n, Scalars s, const float* __restrict inv_bc1,
                                  const float* __restrict inv_sqrt_bc2) {
  for (int j = 0; j < n; ++j) {
    const Moments now = update_moments<M>(m_stored[j], v_stored[j], g[j] * s.grad_factor, s);
    w[j] = w[j] * s.decay - s.step_size * inv_bc1[j] * now.m / (__builtin_sqrtf(now.v) * inv_sqrt_bc2[j] + s.eps);
  }
}

template <class T, class TS = typename T::Storage>
LIFT_CLONES void widen(const TS* __restrict from, float* __restrict to, int n) {
  for (int j = 0; j < n; ++j) to[j] = T::widen(from[j]);
}

template <class T, class TS = typename T::Storage>
LIFT_CLONES void round_nearest(const float* __restrict from, TS* __restrict to, int n) {
  for (int j = 0; j < n; ++j) to[j] = T::round(from[j]);
}

// `position` is the arena position of the first entry.
template <class T, class TS = typename T::Storage>
LIFT_CLONES void round_stochastic(const float* __restrict from, TS* __restrict to, int n, uint32_t position,
                                  uint32_t key) {
  for (int j = 0; j < n; ++j)
    to[j] = StochasticRounding<T>::round(from[j], counter_hash(counter_hash(position + uint32_t(j)) ^ key));
}

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

// kBlock entries on the stack.
template <class T>
struct Buffer {
  alignas(64) T data[kBlock];
};

template <class W, class G, class M>
class Step {
  using WS = typename W::Storage;
  using GS = typename G::Storage;
  using MS = typename M::Storage;

 public:
  Step(const AdamW& adamw, const Segment* segments, const Scalars* scalars)
      : a_(adamw), segments_(segments), scalars_(scalars) {}

  // Processes all blocks that `schedule` gives to this thread.
  void run(GuidedSchedule schedule) const {
    Block ring[kPrefetchDistance];
    int64_t prefetched = 0;
    for (Block block; prefetched < kPrefetchDistance && schedule.next(block); ++prefetched) {
      const int32_t* index = index_of(block);
      for (int j = 0; j < block.n; ++j) prefetch_weight(block, index, j);
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
    if (!a_.packed_grads && a_.master == nullptr) interleave(n, gather_both, later.n, prefetch_g);
    else if (!a_.packed_grads) interleave(n, gather_g, later.n, prefetch_g);
    else if (a_.master == nullptr) interleave(n, gather_w, n, [](int) {});

    float* w = a_.master == nullptr ? widened<W>(w_raw.data, w_wide.data, n) : a_.master + arena;
    const float* g = widened<G>(a_.packed_grads ? grad + block.at : g_raw.data, g_wide.data, n);

    prefetch_streams(later);
    MS* m = static_cast<MS*>(a_.exp_avg) + arena;
    MS* v = static_cast<MS*>(a_.exp_avg_sq) + arena;
    const Scalars& scalars = scalars_[block.segment - segments_];
    if (a_.births == nullptr) {
      update<M>(w, m, v, g, n, scalars);
    } else {
      Buffer<float> inv_bc1, inv_sqrt_bc2;
      for (int j = 0; j < n; ++j) {
        const int64_t age = std::clamp<int64_t>(int64_t(s.step) - a_.births[arena + j], 0, a_.bias_ages);
        inv_bc1.data[j] = a_.bias_table[age];
        inv_sqrt_bc2.data[j] = a_.bias_table[a_.bias_ages + 1 + age];
      }
      update_per_entry<M>(w, m, v, g, n, scalars, inv_bc1.data, inv_sqrt_bc2.data);
    }

    const WS* rounded = w_raw.data;
    if constexpr (sizeof(WS) == 4) rounded = w;
    else if (a_.stochastic) round_stochastic<W>(w, w_raw.data, n, uint32_t(arena), scalars.key);
    else round_nearest<W>(w, w_raw.data, n);
    interleave(n, [&](int j) { weight[index[j]] = rounded[j]; }, later.n, prefetch_w);
  }

  // Returns fp32 entries where they are stored. Widens other types into `buffer`.
  template <class T, class Stored>
  static auto widened(Stored* stored, float* buffer, int n) {
    if constexpr (sizeof(Stored) == 4) {
      return stored;
    } else {
      widen<T>(stored, buffer, n);
      return buffer;
    }
  }

  const AdamW& a_;
  const Segment* segments_;
  const Scalars* scalars_;  // one per segment
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
