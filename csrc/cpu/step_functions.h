// The loops of a step for one level of instruction sets. each_level.h includes this file.
namespace lift::LIFT_LEVEL {
namespace {

template <class M>
LIFT_TARGET void update(float* __restrict w, void* m, void* v, const float* __restrict g, int n, const Scalars& s) {
  auto* __restrict m_stored = static_cast<typename M::Storage*>(m);
  auto* __restrict v_stored = static_cast<typename M::Storage*>(v);
  const Scalars own = s;  // The compiler must not fear that a store changes it.
  for (int j = 0; j < n; ++j) {
    const Moments now = update_moments<M>(m_stored[j], v_stored[j], g[j] * own.grad_factor, own, own.is_near());
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
    const Moments now = update_moments<M>(m_stored[j], v_stored[j], g[j] * own.grad_factor, own, own.is_near());
    w[j] = w[j] * own.decay - own.step_size * inv_bc1[j] * now.m / (__builtin_sqrtf(now.v) * inv_sqrt_bc2[j] + own.eps);
  }
}

// 8-bit moments go in batches of four groups. All loops over a batch have a constant length. They
// convert codes and compute apart: a loop over bytes and floats fills whole vectors of bytes, which at
// v4 takes more entries than a group has, or it has narrower vectors. Where fewer entries are left,
// zeros follow their copies. A zero changes no scale.
constexpr int kGroups = 4, kBatch = kGroups * kGroup;

// `n` entries that are left: they themselves, or a copy if they are no whole batch.
template <class T>
struct Whole {
  T* entries;
  alignas(64) std::remove_const_t<T> copy[kBatch];

  [[gnu::always_inline]] LIFT_TARGET Whole(T* left, int n) : entries(left) {
    if (n >= kBatch) return;
    std::memset(copy, 0, sizeof copy);
    std::memcpy(copy, left, size_t(n) * sizeof(T));
    entries = copy;
  }
  [[gnu::always_inline]] LIFT_TARGET void put_back(T* left, int n) const {
    if (n < kBatch) std::memcpy(left, copy, size_t(n) * sizeof(T));
  }
};

// The moments of a batch. Numbers of groups are first those of first moments, and then of roots.
struct Batch {
  Whole<int8_t> first_codes;
  Whole<uint8_t> root_codes;
  int groups;
  alignas(64) float first[kBatch], root[kBatch], scale[2 * kGroups];
  alignas(64) uint32_t largest[2 * kGroups];  // bits of the largest magnitudes

  [[gnu::always_inline]] LIFT_TARGET Batch(const Codes& c, int at, int n)
      : first_codes(c.first + at, n - at), root_codes(c.root + at, n - at) {
    groups = n - at >= kBatch ? kGroups : (n - at + kGroup - 1) / kGroup;
  }

  [[gnu::always_inline]] LIFT_TARGET void read(const Codes& c, int at) {
    const int8_t* __restrict first_from = first_codes.entries;
    const uint8_t* __restrict root_from = root_codes.entries;
    for (int j = 0; j < kBatch; ++j) first[j] = cube(first_from[j]);
    for (int j = 0; j < kBatch; ++j) root[j] = cube(root_from[j]);
    for (int group = 0; group < kGroups; ++group) {
      scale[group] = group < groups ? c.first_scale[at / kGroup + group] : 0.0f;
      scale[kGroups + group] = group < groups ? c.root_scale[at / kGroup + group] : 0.0f;
    }
  }

  // The root of entry j is rounded by dither(word + j * growth). Its code and its cube root are in loops
  // of their own. Together they are a chain of 150 cycles, of which a core has too few in flight.
  [[gnu::always_inline]] LIFT_TARGET void write(const Codes& c, int at, int n, uint32_t word, uint32_t growth) {
    alignas(64) float factor[2 * kGroups];
    alignas(64) float scaled[kBatch], root_of_scaled[kBatch];
    alignas(64) int32_t first_wide[kBatch], root_wide[kBatch];
    for (int i = 0; i < 2 * kGroups; ++i) {
      const Scale of(largest[i], i < kGroups ? kFirstCube : kRootCube);
      scale[i] = of.scale;
      factor[i] = of.factor;
    }
    for (int group = 0; group < kGroups; ++group) {
      const float first_factor = factor[group], root_factor = factor[kGroups + group];
      for (int j = group * kGroup; j < (group + 1) * kGroup; ++j) first_wide[j] = first_code(first[j], first_factor);
      for (int j = group * kGroup; j < (group + 1) * kGroup; ++j) {
        scaled[j] = on_scale(root[j], root_factor);
        root_of_scaled[j] = cube_root(scaled[j]);
      }
    }
    for (int j = 0; j < kBatch; ++j, word += growth)
      root_wide[j] = root_code(root[j], scaled[j], root_of_scaled[j], dither(word));
    int8_t* __restrict first_to = first_codes.entries;
    uint8_t* __restrict root_to = root_codes.entries;
    for (int j = 0; j < kBatch; ++j) first_to[j] = int8_t(first_wide[j]);
    for (int j = 0; j < kBatch; ++j) root_to[j] = uint8_t(root_wide[j]);
    for (int group = 0; group < groups; ++group) {
      c.first_scale[at / kGroup + group] = scale[group];
      c.root_scale[at / kGroup + group] = scale[kGroups + group];
    }
    first_codes.put_back(c.first + at, n - at);
    root_codes.put_back(c.root + at, n - at);
  }
};

struct Bias {
  float step_size, inv_sqrt_bc2;
};
[[gnu::always_inline]] inline LIFT_TARGET Bias bias_of(const Scalars& s) { return {s.step_size, s.inv_sqrt_bc2}; }
[[gnu::always_inline]] inline LIFT_TARGET Bias bias_of(const Scalars& s, float inv_bc1, float inv_sqrt_bc2) {
  return {s.step_size * inv_bc1, inv_sqrt_bc2};
}

// Updates the weights and moments of a batch. `biases` is empty, or has both corrections of each
// entry.
template <class... Biases>
[[gnu::always_inline]] inline LIFT_TARGET void update_batch(Batch& b, float* __restrict w, const float* __restrict g,
                                                            const Scalars& s, const Biases* __restrict... biases) {
  for (int group = 0; group < kGroups; ++group) {
    const float first_scale = b.scale[group], root_scale = b.scale[kGroups + group];
    uint32_t largest_first = 0, largest_root = 0;
    for (int j = group * kGroup; j < (group + 1) * kGroup; ++j) {
      const Bias bias = bias_of(s, biases[j]...);
      const float old_root = b.root[j] * root_scale;
      float m = b.first[j] * first_scale, v = old_root * old_root;
      update_moments<F32>(m, v, g[j] * s.grad_factor, s, s.near);
      const float root = __builtin_sqrtf(v);
      w[j] = w[j] * s.decay - bias.step_size * m / (root * bias.inv_sqrt_bc2 + s.eps);
      b.first[j] = m;
      b.root[j] = root;
      const uint32_t first_bits = bits_of(m) & 0x7fffffffu, root_bits = bits_of(root) & 0x7fffffffu;
      largest_first = first_bits > largest_first ? first_bits : largest_first;
      largest_root = root_bits > largest_root ? root_bits : largest_root;
    }
    b.largest[group] = largest_first;
    b.largest[kGroups + group] = largest_root;
  }
}

template <class... Biases>
[[gnu::always_inline]] inline LIFT_TARGET void update_batches(float* w, const Codes& codes, const float* g, int n,
                                                              const Scalars& scalars, const Biases*... biases) {
  const Scalars s = scalars;  // The compiler must not fear that a store changes it.
  const Codes c = codes;
  for (int at = 0; at < n; at += kBatch) {
    const Whole<float> weights(w + at, n - at);
    Batch batch(c, at, n);
    batch.read(c, at);
    update_batch(batch, weights.entries, Whole(g + at, n - at).entries, s, Whole(biases + at, n - at).entries...);
    batch.write(c, at, n, (c.position + uint32_t(at)) * kDitherPosition + c.dither, kDitherPosition);
    weights.put_back(w + at, n - at);
  }
}

LIFT_TARGET void update_codes(float* w, const Codes& moments, const float* g, int n, const Scalars& s) {
  update_batches(w, moments, g, n, s);
}

LIFT_TARGET void update_codes_per_entry(float* w, const Codes& moments, const float* g, int n, const Scalars& s,
                                        const float* inv_bc1, const float* inv_sqrt_bc2) {
  update_batches(w, moments, g, n, s, inv_bc1, inv_sqrt_bc2);
}

LIFT_TARGET void encode(const float* first, const float* root, const Codes& moments, int n) {
  const Codes c = moments;
  for (int at = 0; at < n; at += kBatch) {
    Batch b(c, at, n);
    const Whole first_left(first + at, n - at), root_left(root + at, n - at);
    const float *__restrict first_in = first_left.entries, *__restrict root_in = root_left.entries;
    for (int group = 0; group < kGroups; ++group) {
      uint32_t largest_first = 0, largest_root = 0;
      for (int j = group * kGroup; j < (group + 1) * kGroup; ++j) {
        b.first[j] = first_in[j];
        b.root[j] = root_in[j];
        const uint32_t first_bits = bits_of(b.first[j]) & 0x7fffffffu, root_bits = bits_of(b.root[j]) & 0x7fffffffu;
        largest_first = first_bits > largest_first ? first_bits : largest_first;
        largest_root = root_bits > largest_root ? root_bits : largest_root;
      }
      b.largest[group] = largest_first;
      b.largest[kGroups + group] = largest_root;
    }
    b.write(c, at, n, 1u << 31, 0);  // up = 0.5
  }
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
