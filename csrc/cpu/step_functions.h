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

// The update of 8-bit moments, a group after the other. `bias_of` gives both corrections of an entry.
template <class Bias>
[[gnu::always_inline]] inline LIFT_TARGET void update_group(float* __restrict w, const Codes& c, int group,
                                                            const float* __restrict g, int n, const Scalars& s,
                                                            const Bias& bias_of) {
  const int start = group * kGroup;
  int8_t* __restrict first = c.first + start;
  uint8_t* __restrict root = c.root + start;
  const float first_scale = c.first_scale[group], root_scale = c.root_scale[group];
  alignas(64) float m_new[kGroup], root_new[kGroup];
  uint32_t largest_m = 0, largest_root = 0;
  for (int j = 0; j < n; ++j) {
    float m = cube(first[j]) * first_scale;
    const float old_root = cube(root[j]) * root_scale;
    float v = old_root * old_root;
    const Moments now = update_moments<F32>(m, v, g[start + j] * s.grad_factor, s);
    const float new_root = __builtin_sqrtf(now.v);
    const auto [step_size, inv_sqrt_bc2] = bias_of(start + j);
    w[start + j] = w[start + j] * s.decay - step_size * now.m / (new_root * inv_sqrt_bc2 + s.eps);
    m_new[j] = now.m;
    root_new[j] = new_root;
    const uint32_t m_bits = bits_of(now.m) & 0x7fffffffu, root_bits = bits_of(new_root) & 0x7fffffffu;
    largest_m = m_bits > largest_m ? m_bits : largest_m;
    largest_root = root_bits > largest_root ? root_bits : largest_root;
  }
  const Scale of_m(largest_m, kFirstCube), of_root(largest_root, kRootCube);
  const uint32_t position = c.position + uint32_t(start);
  for (int j = 0; j < n; ++j) {
    first[j] = first_code(m_new[j], of_m.factor);
    root[j] = root_code(root_new[j], of_root.factor, dither(position + uint32_t(j), c.dither));
  }
  c.first_scale[group] = of_m.scale;
  c.root_scale[group] = of_root.scale;
}

// Calls work(group, n) for the groups of n entries.
template <class Work>
[[gnu::always_inline]] inline LIFT_TARGET void for_groups(int n, const Work& work) {
  int group = 0;
  for (; (group + 1) * kGroup <= n; ++group) work(group, kGroup);
  if (n % kGroup != 0) work(group, n % kGroup);
}

struct Bias {
  float step_size, inv_sqrt_bc2;
};

LIFT_TARGET void update_codes(float* w, const Codes& moments, const float* g, int n, const Scalars& s) {
  const Scalars own = s;
  const Codes c = moments;
  for_groups(n, [&](int group, int entries) LIFT_TARGET __attribute__((always_inline)) {
    update_group(w, c, group, g, entries, own,
                 [&](int) LIFT_TARGET __attribute__((always_inline)) { return Bias{own.step_size, own.inv_sqrt_bc2}; });
  });
}

LIFT_TARGET void update_codes_per_entry(float* w, const Codes& moments, const float* g, int n, const Scalars& s,
                                        const float* __restrict inv_bc1, const float* __restrict inv_sqrt_bc2) {
  const Scalars own = s;
  const Codes c = moments;
  for_groups(n, [&](int group, int entries) LIFT_TARGET __attribute__((always_inline)) {
    update_group(w, c, group, g, entries, own, [&](int j) LIFT_TARGET __attribute__((always_inline)) {
      return Bias{own.step_size * inv_bc1[j], inv_sqrt_bc2[j]};
    });
  });
}

LIFT_TARGET void decode(const Codes& c, float* __restrict first, float* __restrict root, int n) {
  for_groups(n, [&](int group, int entries) LIFT_TARGET __attribute__((always_inline)) {
    const int start = group * kGroup;
    const float first_scale = c.first_scale[group], root_scale = c.root_scale[group];
    for (int j = start; j < start + entries; ++j) first[j] = cube(c.first[j]) * first_scale;
    for (int j = start; j < start + entries; ++j) root[j] = cube(c.root[j]) * root_scale;
  });
}

LIFT_TARGET void encode(const float* __restrict first, const float* __restrict root, const Codes& c, int n) {
  for_groups(n, [&](int group, int entries) LIFT_TARGET __attribute__((always_inline)) {
    const int start = group * kGroup;
    uint32_t largest_m = 0, largest_root = 0;
    for (int j = start; j < start + entries; ++j) {
      const uint32_t m_bits = bits_of(first[j]) & 0x7fffffffu, root_bits = bits_of(root[j]) & 0x7fffffffu;
      largest_m = m_bits > largest_m ? m_bits : largest_m;
      largest_root = root_bits > largest_root ? root_bits : largest_root;
    }
    const Scale of_m(largest_m, kFirstCube), of_root(largest_root, kRootCube);
    for (int j = start; j < start + entries; ++j) c.first[j] = first_code(first[j], of_m.factor);
    for (int j = start; j < start + entries; ++j) c.root[j] = root_code(root[j], of_root.factor, 0.5f);
    c.first_scale[group] = of_m.scale;
    c.root_scale[group] = of_root.scale;
  });
}

LIFT_TARGET void join(const void* weights, const int16_t* __restrict low, float* __restrict masters, int n) {
  const auto* __restrict stored = static_cast<const uint16_t*>(weights);
  for (int j = 0; j < n; ++j) masters[j] = join_master(stored[j], low[j]);
}

LIFT_TARGET void split(const float* __restrict masters, void* weights, int16_t* __restrict low, int n) {
  auto* __restrict stored = static_cast<uint16_t*>(weights);
  for (int j = 0; j < n; ++j) {
    stored[j] = BF16::round(masters[j]);
    low[j] = low_half(masters[j]);
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
    update_codes,
    update_codes_per_entry,
    decode,
    encode,
    join,
    split,
    {nullptr, widen<BF16>, widen<F16>},
    {nullptr, round_nearest<BF16>, round_nearest<F16>},
    {nullptr, round_stochastic<BF16>, round_stochastic<F16>},
    {add_squares<F32>, add_squares<BF16>, add_squares<F16>},
};

}  // namespace
}  // namespace lift::LIFT_LEVEL
