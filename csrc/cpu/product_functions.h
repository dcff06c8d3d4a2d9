// The loops over a low-rank product for one level of instruction sets. each_level.h includes this
// file.
namespace lift::LIFT_LEVEL {
namespace {

constexpr int kLanes = LIFT_LANES, kVectors = LIFT_TILE_VECTORS, kPanelColumns = kLanes * kVectors;

// The unaligned types are for loads and stores.
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Keys = uint32_t __attribute__((vector_size(4 * kLanes)));
using UnalignedFloats = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using UnalignedKeys = uint32_t __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// The sums of kTileRows rows with one panel stay in registers.
LIFT_TARGET void compute_keys(const float* const* rows, const float* panels, int64_t rank,
                              uint32_t (*keys)[kWordBits]) {
  for (int column = 0; column < kWordBits; column += kPanelColumns) {
    const float* const panel = panels + column * rank;
    Floats sum[kTileRows][kVectors] = {};
    for (int64_t p = 0; p < rank; ++p) {
      const auto* right = reinterpret_cast<const UnalignedFloats*>(panel + p * kPanelColumns);
      for (int i = 0; i < kTileRows; ++i)
        for (int v = 0; v < kVectors; ++v) sum[i][v] += rows[i][p] * right[v];
    }
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<UnalignedKeys*>(keys[i] + column + v * kLanes) =
            reinterpret_cast<Keys>(sum[i][v]) & 0x7fffffffu;
  }
}

#if defined(__x86_64__)

// Bit j of the result is set if lane j of keys is at least the bound.
[[gnu::always_inline]] LIFT_TARGET inline uint64_t lanes_at_least(Keys keys, uint32_t bound) {
#if LIFT_LANES == 16
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(keys), reinterpret_cast<__m512i>(bound - Keys{}));
#else
  // These levels compare signed numbers alone.
  using Signed = int32_t __attribute__((vector_size(4 * kLanes)));
  const Signed above = reinterpret_cast<Signed>(keys) > int32_t(bound - 1) - Signed{};
#if LIFT_LANES == 8
  return uint64_t(_mm256_movemask_ps(reinterpret_cast<__m256>(above)));
#else
  return uint64_t(_mm_movemask_ps(reinterpret_cast<__m128>(above)));
#endif
#endif
}

LIFT_TARGET void at_least(const uint32_t* keys, const uint32_t (&bounds)[2], uint64_t (&words)[2]) {
  uint64_t first = 0, second = 0;
  for (int j = 0; j < kWordBits; j += kLanes) {
    const Keys now = *reinterpret_cast<const UnalignedKeys*>(keys + j);
    first |= lanes_at_least(now, bounds[0]) << j;
    second |= lanes_at_least(now, bounds[1]) << j;
  }
  words[0] = first, words[1] = second;
}

#else

// A lane collects one bit of each of eight vectors. So lanes are joined twice and not sixteen times.
LIFT_TARGET void at_least(const uint32_t* keys, const uint32_t (&bounds)[2], uint64_t (&words)[2]) {
  constexpr int kHalf = kWordBits / 2;
  for (int b = 0; b < 2; ++b) {
    words[b] = 0;
    for (int half = 0; half < kWordBits; half += kHalf) {
      Keys bits = {};
      for (int j = 0; j < kHalf; j += kLanes) {
        const Keys now = *reinterpret_cast<const UnalignedKeys*>(keys + half + j);
        bits |= reinterpret_cast<Keys>(now >= bounds[b] - Keys{}) & (Keys{1, 2, 4, 8} << j);
      }
#if defined(__aarch64__)
      words[b] |= uint64_t(vaddvq_u32(reinterpret_cast<uint32x4_t>(bits))) << half;
#else
      words[b] |= uint64_t((bits[0] | bits[1]) | (bits[2] | bits[3])) << half;
#endif
    }
  }
}

#endif

constexpr ProductLoops loops = {compute_keys, at_least, kPanelColumns};

}  // namespace
}  // namespace lift::LIFT_LEVEL
