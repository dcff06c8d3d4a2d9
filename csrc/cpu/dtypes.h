// Element types of the CPU kernels. Each is a storage format that widens to fp32 and rounds back.
// The conversions are written so that loops over them vectorize.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../launchers.h"

namespace lift {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct F32 {
  static constexpr int number = int(DType::f32);
  using Storage = float;
  static float widen(float x) { return x; }
  static float round(float x) { return x; }
};

struct BF16 {
  static constexpr int number = int(DType::bf16);
  using Storage = uint16_t;
  static float widen(uint16_t x) { return float_of(uint32_t(x) << 16); }
  static uint16_t round(float x) {  // to nearest even; a NaN keeps its sign and stays a NaN
    const uint32_t bits = bits_of(x);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest);
  }
};

struct F16 {
  static constexpr int number = int(DType::f16);
  using Storage = uint16_t;
  static float widen(uint16_t x) {
    // Shift exponent and mantissa into place, then multiply by 2^112, which is exact. Infinities and
    // NaN get an exponent of all ones. It is not chosen by a branch, so that sums vectorize, too.
    const uint32_t sign = uint32_t(x & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(x & 0x7fffu) << 13;
    const float scaled = float_of(magnitude) * float_of(0x77800000u);
    const uint32_t special = -uint32_t(int32_t(magnitude) > 0x0f7fffff) & 0x7f800000u;
    return float_of(sign | special | bits_of(scaled));
  }
  static uint16_t round(float x) {  // to nearest even
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal range: rebias the exponent (-112) and round 13 bits away. A carry into the exponent is
    // correct, also up to infinity.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 puts the quantum 2^-24 at the last mantissa bit. The addition itself
    // then rounds to even.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return uint16_t(sign | half);
  }
};

// Converts a stored value to another format, rounded to nearest even.
template <class From, class To>
typename To::Storage convert(typename From::Storage x) {
  if constexpr (std::is_same_v<From, To>) return x;  // the same bits, NaN payloads too
  else return To::round(From::widen(x));
}

// Calls f with a value of the element type of `dtype`.
template <class F>
void dispatch_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(F32{});
  else if (dtype == DType::bf16) f(BF16{});
  else f(F16{});
}

// The bijective 32-bit mixer of the reference implementation (counter_hash).
inline uint32_t counter_hash(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T>
struct StochasticRounding;

template <>
struct StochasticRounding<F32> {
  static float round(float x, uint32_t) { return x; }
};

template <>
struct StochasticRounding<BF16> {
  static uint16_t round(float x, uint32_t noise) {
    const uint32_t bits = bits_of(x);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? uint16_t((bits + (noise & 0xffffu)) >> 16) : BF16::round(x);
  }
};

template <>
struct StochasticRounding<F16> {
  static uint16_t round(float x, uint32_t noise) {
    const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    if (magnitude >= 0x7f800000u) return F16::round(x);
    if (magnitude >= 0x38800000u) return F16::round(float_of((bits + (noise & 0x1fffu)) & 0xffffe000u));
    // Below 2^-14 the format is fixed-point with quantum 2^-24. The scaled value is exact in fp32.
    const float scaled = float_of(magnitude) * 16777216.0f + float(noise >> 8) * (1.0f / 16777216.0f);
    return uint16_t((sign >> 16) | uint32_t(int32_t(scaled)));
  }
};

}  // namespace lift
