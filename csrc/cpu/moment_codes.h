// 8-bit codes of moments, and low halves of masters. lift_kernels/ops/state_formats.py specifies both.
#pragma once

#include <cstdint>

#include "../launchers.h"
#include "dtypes.h"

namespace lift {

// The codes of some entries from a group's start on, and the scales of their groups.
struct Codes {
  int8_t* first;
  uint8_t* root;
  float* first_scale;
  float* root_scale;
  uint32_t position;  // in the arena, of the first entry
  uint32_t dither;    // of the step
};

constexpr float kFirstCube = 127.0f * 127.0f * 127.0f, kRootCube = 255.0f * 255.0f * 255.0f;
constexpr uint32_t kDitherPosition = 0xc13fa9a9u, kDitherStep = 0x91e10da5u;

// The cube root of x, 2^-60 to 2^24, with a relative error below 2^-14. No lane divides.
[[gnu::always_inline]] inline float cube_root(float x) {
  float root = float_of(uint32_t(0x54a2fa8c - int32_t(float(int32_t(bits_of(x))) * (1.0f / 3.0f))));
  const float third = x * (1.0f / 3.0f);
  root = root * (4.0f / 3.0f - third * (root * root * root));
  root = root * (4.0f / 3.0f - third * (root * root * root));
  return x * (root * root);
}

// A group's scale, and the factor that puts its entries on the scale of cubes of codes.
struct Scale {
  float scale, factor;

  // `largest` has the bits of the largest magnitude. A NaN is larger than all others.
  [[gnu::always_inline]] Scale(uint32_t largest, float cube) {
    const float x = float_of(largest);
    const bool coded = largest >= bits_of(0x1p-100f);
    scale = coded ? x * (1.0f / cube) : 0.0f;
    factor = coded ? cube / x : 0.0f;
    if (largest >= 0x7f800000u) scale = float_of(0x7fc00000u), factor = 0.0f;
  }
};

// Puts a magnitude on the scale of cubes of codes. All that is tiny is 2^-60 there, and so is NaN.
[[gnu::always_inline]] inline float on_scale(float magnitude, float factor) {
  const float scaled = magnitude * factor;
  return scaled > 0x1p-60f ? scaled : 0x1p-60f;
}

[[gnu::always_inline]] inline int32_t first_code(float moment, float factor) {
  const uint32_t bits = bits_of(moment), magnitude = bits & 0x7fffffffu;
  const float code = cube_root(on_scale(float_of(magnitude), factor)) + 0.5f;
  return int32_t(float_of(bits_of(code) | (bits ^ magnitude)));  // truncated towards zero
}

// The code of a root, from what `on_scale` makes of it and the cube root of that. It is rounded up
// where the share of the way to the next code is 1 - up or more. Comparisons are numbers here, because
// GCC would make branches of them.
[[gnu::always_inline]] inline int32_t root_code(float root, float scaled, float root_of_scaled, float up) {
  const int32_t code = int32_t(root_of_scaled);
  const float below = float(code);
  const float distance = 3.0f * below * (below + 1.0f) + 1.0f;
  const int32_t rounded = code + int32_t(scaled - below * below * below >= (1.0f - up) * distance);
  const int32_t at_least_one = rounded < 1 ? 1 : rounded;
  return (at_least_one > 255 ? 255 : at_least_one) & -int32_t(root > 0.0f);
}

// Of a word that grows by kDitherPosition from an arena position to the next, and by kDitherStep a
// step.
[[gnu::always_inline]] inline float dither(uint32_t word) { return float(int32_t(word >> 8)) * 0x1p-24f; }

[[gnu::always_inline]] inline float cube(int32_t code) {
  const float x = float(code);
  return x * x * x;
}

// The fp32 master of a bf16 weight, and the low half that is kept of it.
[[gnu::always_inline]] inline float join_master(uint16_t weight, int16_t low) {
  int32_t distance = low == -0x8000 ? 0x8000 : int32_t(low);
  distance = (weight & 0x7fffu) == 0 && distance < 0 ? 0 : distance;  // a zero from outside
  return float_of((uint32_t(weight) << 16) + uint32_t(distance));
}
[[gnu::always_inline]] inline int16_t low_half(float master) {
  const uint32_t bits = bits_of(master);
  const bool above_middle = (bits & 0x1ffffu) == 0x18000u;
  return int16_t(uint16_t(bits + (above_middle ? 1u : 0u)));
}

}  // namespace lift
