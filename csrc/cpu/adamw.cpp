// The sparse AdamW step on the CPU.
//
// Blocks of 256 entries pass three stages: gather the weight and gradient entries into buffers that stay in L1, update them
// with plain vector loops, scatter the weights. The gathers touch far more lines than the arithmetic costs, so the lines of
// a block a little ahead are prefetched while the current one is worked on.
#include <algorithm>
#include <vector>

#include "../launchers.h"
#include "elements.h"
#include "parallel.h"

namespace lift {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kChunk = 8192;   // entries a task handles; a multiple of kBlock
constexpr int64_t kAhead = 256;    // entries between the block in work and the lines being prefetched

struct Scalars {
  float one_minus_beta1, beta2, one_minus_beta2, eps, decay;
};

// w, m, v <- AdamW(g); step_size and inv_sqrt_bc2 are constant over the block.
LIFT_CLONES void update(float* __restrict w, float* __restrict m, float* __restrict v, const float* __restrict g, int n,
                        Scalars s, float step_size, float inv_sqrt_bc2) {
  for (int j = 0; j < n; ++j) {
    m[j] = m[j] + s.one_minus_beta1 * (g[j] - m[j]);
    v[j] = s.beta2 * v[j] + s.one_minus_beta2 * g[j] * g[j];
    const float denom = __builtin_sqrtf(v[j]) * inv_sqrt_bc2 + s.eps;
    w[j] = w[j] * s.decay - step_size * m[j] / denom;
  }
}

// The same with the bias corrections of each entry's own age.
LIFT_CLONES void update_per_entry(float* __restrict w, float* __restrict m, float* __restrict v, const float* __restrict g,
                                  int n, Scalars s, float lr, const float* __restrict inv_bc1,
                                  const float* __restrict inv_sqrt_bc2) {
  for (int j = 0; j < n; ++j) {
    m[j] = m[j] + s.one_minus_beta1 * (g[j] - m[j]);
    v[j] = s.beta2 * v[j] + s.one_minus_beta2 * g[j] * g[j];
    const float denom = __builtin_sqrtf(v[j]) * inv_sqrt_bc2[j] + s.eps;
    w[j] = w[j] * s.decay - lr * inv_bc1[j] * m[j] / denom;
  }
}

LIFT_CLONES void scale(float* __restrict x, int n, float factor) {
  for (int j = 0; j < n; ++j) x[j] *= factor;
}

LIFT_CLONES void widen(const uint16_t* __restrict from, float* __restrict to, int n, BF16) {
  for (int j = 0; j < n; ++j) to[j] = BF16::widen(from[j]);
}
LIFT_CLONES void widen(const uint16_t* __restrict from, float* __restrict to, int n, F16) {
  for (int j = 0; j < n; ++j) to[j] = F16::widen(from[j]);
}
LIFT_CLONES void widen(const float* __restrict from, float* __restrict to, int n, F32) {
  for (int j = 0; j < n; ++j) to[j] = from[j];
}
LIFT_CLONES void round_all(const float* __restrict from, uint16_t* __restrict to, int n, BF16) {
  for (int j = 0; j < n; ++j) to[j] = BF16::round(from[j]);
}
LIFT_CLONES void round_all(const float* __restrict from, uint16_t* __restrict to, int n, F16) {
  for (int j = 0; j < n; ++j) to[j] = F16::round(from[j]);
}
LIFT_CLONES void round_all(const float* __restrict from, float* __restrict to, int n, F32) {
  for (int j = 0; j < n; ++j) to[j] = from[j];
}

// Arrays of this many entries on the stack of a task.
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
  Step(const Segment& segment, const AdamW& adamw) : s_(segment), a_(adamw) {}

  // Entries begin .. end of the segment.
  void run(int64_t begin, int64_t end) const {
    prefetch(begin, std::min(begin + kAhead, end));
    for (int64_t at = begin; at < end; at += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, end - at));
      prefetch(at + kAhead, std::min(at + kAhead + kBlock, end));
      block(at, n);
    }
  }

 private:
  void prefetch(int64_t begin, int64_t end) const {
    const int32_t* index = a_.indices + s_.offset;
    const WS* weight = static_cast<const WS*>(s_.weight);
    const GS* grad = static_cast<const GS*>(s_.grad);
    for (int64_t j = begin; j < end; ++j) __builtin_prefetch(weight + index[j], 1);
    if (a_.packed_grads) return;
    for (int64_t j = begin; j < end; ++j) __builtin_prefetch(grad + index[j], 0);
  }

  void block(int64_t at, int n) const {
    const int64_t arena = s_.offset + at;
    const int32_t* index = a_.indices + arena;
    WS* weight = static_cast<WS*>(s_.weight);
    Buffer<WS> w_raw;
    Buffer<GS> g_raw;
    Buffer<float> w_buffer, g, m_buffer, v_buffer;

    const GS* grad = static_cast<const GS*>(s_.grad);
    if (a_.packed_grads) {
      widen(grad + at, g.data, n, G{});
    } else {
      for (int j = 0; j < n; ++j) g_raw.data[j] = grad[index[j]];
      widen(g_raw.data, g.data, n, G{});
    }
    if (a_.grad_factor != 1.0f) scale(g.data, n, a_.grad_factor);

    float* w = w_buffer.data;
    if (a_.master != nullptr) {
      w = a_.master + arena;  // the truth: the weight itself is only written
    } else {
      for (int j = 0; j < n; ++j) w_raw.data[j] = weight[index[j]];
      widen(w_raw.data, w, n, W{});
    }
    MS* m_arena = static_cast<MS*>(a_.exp_avg) + arena;
    MS* v_arena = static_cast<MS*>(a_.exp_avg_sq) + arena;
    float* m = in_place(m_arena, m_buffer.data, n);
    float* v = in_place(v_arena, v_buffer.data, n);

    const Scalars scalars{a_.one_minus_beta1, a_.beta2, a_.one_minus_beta2, a_.eps, s_.decay};
    if (a_.births == nullptr) {
      update(w, m, v, g.data, n, scalars, s_.step_size, s_.inv_sqrt_bc2);
    } else {
      Buffer<float> inv_bc1, inv_sqrt_bc2;
      for (int j = 0; j < n; ++j) {
        const int64_t age = std::min<int64_t>(int64_t(s_.step) - a_.births[arena + j], a_.bias_ages);
        inv_bc1.data[j] = a_.bias_table[age];
        inv_sqrt_bc2.data[j] = a_.bias_table[a_.bias_ages + 1 + age];
      }
      update_per_entry(w, m, v, g.data, n, scalars, s_.step_size, inv_bc1.data, inv_sqrt_bc2.data);
    }

    if constexpr (sizeof(MS) == 2) {
      round_all(m, m_arena, n, M{});
      round_all(v, v_arena, n, M{});
    }
    if (a_.stochastic) {
      for (int j = 0; j < n; ++j) {
        const uint32_t noise = counter_hash(counter_hash(uint32_t(arena + j)) ^ s_.key);
        w_raw.data[j] = Stochastic<W>::round(w[j], noise);
      }
    } else {
      round_all(w, w_raw.data, n, W{});
    }
    for (int j = 0; j < n; ++j) weight[index[j]] = w_raw.data[j];
  }

  static float* in_place(float* arena, float*, int) { return arena; }
  static float* in_place(const uint16_t* arena, float* buffer, int n) {
    widen(arena, buffer, n, M{});
    return buffer;
  }

  const Segment& s_;
  const AdamW& a_;
};

template <class W, class G, class M>
void step_all(const Segment* segments, int64_t n, const AdamW& adamw, ParallelFor parallel_for) {
  // Tasks of at most kChunk entries over all matrices, so that threads share the work whatever the matrices' sizes.
  std::vector<std::pair<int64_t, int64_t>> tasks;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t at = 0; at < segments[i].count; at += kChunk) tasks.emplace_back(i, at);
  for_ranges(parallel_for, int64_t(tasks.size()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Segment& segment = segments[tasks[t].first];
      Step<W, G, M>(segment, adamw).run(tasks[t].second, std::min(tasks[t].second + kChunk, segment.count));
    }
  });
}

template <class W, class G>
void with_moment(const Segment* segments, int64_t n, const AdamW& adamw, DType moment, ParallelFor parallel_for) {
  if (moment == DType::f32) step_all<W, G, F32>(segments, n, adamw, parallel_for);
  else step_all<W, G, BF16>(segments, n, adamw, parallel_for);
}

template <class W>
void with_grad(const Segment* segments, int64_t n, const AdamW& adamw, DType grad, DType moment, ParallelFor parallel_for) {
  if (grad == DType::f32) with_moment<W, F32>(segments, n, adamw, moment, parallel_for);
  else if (grad == DType::bf16) with_moment<W, BF16>(segments, n, adamw, moment, parallel_for);
  else with_moment<W, F16>(segments, n, adamw, moment, parallel_for);
}

}  // namespace

void sparse_adamw_cpu(const Segment* segments, int64_t n, const AdamW& adamw, DType weight, DType grad, DType moment,
                      ParallelFor parallel_for) {
  if (weight == DType::f32) with_grad<F32>(segments, n, adamw, grad, moment, parallel_for);
  else if (weight == DType::bf16) with_grad<BF16>(segments, n, adamw, grad, moment, parallel_for);
  else with_grad<F16>(segments, n, adamw, grad, moment, parallel_for);
}

}  // namespace lift
