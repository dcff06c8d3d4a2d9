// The loops of a step for one level of instruction sets. each_level.h includes this file.
namespace lift::LIFT_LEVEL {
namespace {

template <class M>
LIFT_TARGET void update(float* __restrict w, void* m, void* v, const float* __restrict g, int n, const Scalars& s) {
  auto* __restrict m_stored = static_cast<typename M::Storage*>(m);
  auto* __restrict v_stored = static_cast<typename M::Storage*>(v);
  const Scalars own = s;  // The compiler must not fear that a store changes it.
  for (int j = 0; j < n; ++j) {
    const Moments now = update_moments<M>(m_stored[j], v_stored[j], g[j] * own.grad_factor, own);
    w[j] = w[j] * own.decay - own.step_size * now.m / (__builtin_sqrtf(now.v) * own.inv_sqrt_bc2 + own.eps);
  }
}

template <class M>
LIFT_TARGET void update_per_entry(float* __restrict w, void* m, void* v, const float* __restrict g, int n,
                                  const Scalars& s, const float* __restrict inv_bc1,
                                  const float* __restrict inv_sqrt_bc2) {
  auto* __restrict m_stored = static_cast<typename M::Storage*>(m);
  auto* __restrict v_stored = static_cast<typename M::Storage*>(v);
  const Scalars own = s;
  for (int j = 0; j < n; ++j) {
    const Moments now = update_moments<M>(m_stored[j], v_stored[j], g[j] * own.grad_factor, own);
    w[j] = w[j] * own.decay - own.step_size * inv_bc1[j] * now.m / (__builtin_sqrtf(now.v) * inv_sqrt_bc2[j] + own.eps);
  }
}

template <class T>
LIFT_TARGET void widen(const void* from, float* __restrict to, int n) {
  const auto* __restrict stored = static_cast<const typename T::Storage*>(from);
  for (int j = 0; j < n; ++j) to[j] = T::widen(stored[j]);
}

template <class T>
LIFT_TARGET void round_nearest(const float* __restrict from, void* to, int n) {
  auto* __restrict stored = static_cast<typename T::Storage*>(to);
  for (int j = 0; j < n; ++j) stored[j] = T::round(from[j]);
}

template <class T>
LIFT_TARGET void round_stochastic(const float* __restrict from, void* to, int n, uint32_t position, uint32_t key) {
  auto* __restrict stored = static_cast<typename T::Storage*>(to);
  for (int j = 0; j < n; ++j)
    stored[j] = StochasticRounding<T>::round(from[j], counter_hash(counter_hash(position + uint32_t(j)) ^ key));
}

template <class T>
LIFT_TARGET void add_squares(const void* values, int64_t n, double* out) {
  const auto* __restrict stored = static_cast<const typename T::Storage*>(values);
  double sums[4] = {out[0], out[1], out[2], out[3]};
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    for (int i = 0; i < 4; ++i) {
      const double x = T::widen(stored[j + i]);
      sums[i] += x * x;
    }
  for (; j < n; ++j) {
    const double x = T::widen(stored[j]);
    sums[j & 3] += x * x;
  }
  for (int i = 0; i < 4; ++i) out[i] = sums[i];
}

constexpr StepLoops loops = {
    {update<F32>, update<BF16>, nullptr},
    {update_per_entry<F32>, update_per_entry<BF16>, nullptr},
    {nullptr, widen<BF16>, widen<F16>},
    {nullptr, round_nearest<BF16>, round_nearest<F16>},
    {nullptr, round_stochastic<BF16>, round_stochastic<F16>},
    {add_squares<F32>, add_squares<BF16>, add_squares<F16>},
};

}  // namespace
}  // namespace lift::LIFT_LEVEL
