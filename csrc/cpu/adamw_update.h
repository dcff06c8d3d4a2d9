// The arithmetic of one entry of a step, and the scalars that it needs.
#pragma once

#include <cmath>
#include <cstdint>

#include "../launchers.h"
#include "dtypes.h"
#include "moment_codes.h"

namespace lift {

// Scalars of the update of one matrix. They are formed in fp64 and then rounded to fp32. Forming
// 1 - beta2 in fp32 would triple the error.
struct Scalars {
  float one_minus_beta1, beta2, one_minus_beta2, eps, decay, grad_factor;
  float step_size;     // lr / bc1, or lr if each entry has its own bias correction
  float inv_sqrt_bc2;  // 1 / sqrt(bc2)
  uint32_t key;        // of stochastic rounding, from the seed and the step
  uint32_t dither;     // of 8-bit codes, from the step
  bool near;           // of is_near, for loops in which a comparison of floats would stay

  Scalars(const AdamW& a, float step)
      : one_minus_beta1(float(1 - a.beta1)),
        beta2(float(a.beta2)),
        one_minus_beta2(float(1 - a.beta2)),
        eps(float(a.eps)),
        decay(float(1 - a.lr * a.weight_decay)),
        grad_factor(a.grad_factor),
        step_size(float(a.births != nullptr ? a.lr : a.lr / (1 - std::pow(a.beta1, double(step))))),
        inv_sqrt_bc2(float(1 / std::sqrt(1 - std::pow(a.beta2, double(step))))),
        key(counter_hash(counter_hash(a.seed) ^ uint32_t(int64_t(step)))),
        dither(uint32_t(int64_t(step)) * kDitherStep),
        near(is_near()) {}

  // Whether a new first moment is nearer to the old one than to the gradient.
  bool is_near() const { return one_minus_beta1 < 0.5f; }
};

struct Moments {
  float m, v;
};

// Updates the stored moments of one entry. Returns the new moments before they are rounded.
template <class M, class MS = typename M::Storage>
[[gnu::always_inline]] inline Moments update_moments(MS& m_stored, MS& v_stored, float g, const Scalars& s,
                                                    bool near) {
  // This is torch's lerp. It is exact at both ends, so beta1 = 0 gives the gradient itself.
  const float m_old = M::widen(m_stored);
  const float m = (near ? m_old : g) + (near ? s.one_minus_beta1 : s.one_minus_beta1 - 1.0f) * (g - m_old);
  const float v = s.beta2 * M::widen(v_stored) + s.one_minus_beta2 * g * g;
  m_stored = M::round(m);
  v_stored = M::round(v);
  return {m, v};
}

}  // namespace lift
