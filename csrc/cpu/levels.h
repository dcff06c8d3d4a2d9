// The levels of instruction sets, and the loops that are compiled for each of them.
//
// Such a loop is reached through a table of function pointers. One level serves the whole process.
#pragma once

#include <cstdint>

#include "../launchers.h"

namespace lift {

struct Scalars;  // of an update; adamw_update.h
struct Codes;    // 8-bit moments; moment_codes.h

constexpr int kFormats = 3;    // f32, bf16, f16: the numbers of their DTypes
constexpr int kWordBits = 64;  // columns per word of a bitmap
constexpr int kTileRows = 6;   // of a product

// Stored values are of the format that indexes a function. Entries are null for formats that an op
// does not have.
struct StepLoops {
  // Updates fp32 weights and the stored moments of n entries.
  void (*update[kFormats])(float* w, void* m, void* v, const float* g, int n, const Scalars& s);
  // Does the same with a bias correction for the age of each entry.
  void (*update_per_entry[kFormats])(float* w, void* m, void* v, const float* g, int n, const Scalars& s,
                                     const float* inv_bc1, const float* inv_sqrt_bc2);
  // The same two for 8-bit moments.
  void (*update_codes)(float* w, const Codes& moments, const float* g, int n, const Scalars& s);
  void (*update_codes_per_entry)(float* w, const Codes& moments, const float* g, int n, const Scalars& s,
                                 const float* inv_bc1, const float* inv_sqrt_bc2);
  // The codes of first moments and of roots of second ones, rounded to nearest.
  void (*encode)(const float* first, const float* root, const Codes& moments, int n);
  // fp32 masters of bf16 weights and their low halves, and the weights and low halves of masters.
  void (*join)(const void* weights, const int16_t* low, float* masters, int n);
  void (*split)(const float* masters, void* weights, int16_t* low, int n);
  void (*widen[kFormats])(const void* from, float* to, int n);
  void (*round_nearest[kFormats])(const float* from, void* to, int n);
  // `position` is the arena position of the first entry, `key` that of the step.
  void (*round_stochastic[kFormats])(const float* from, void* to, int n, uint32_t position, uint32_t key);
  // Adds the squares of n values to four sums; value j goes to sum j & 3.
  void (*add_squares[kFormats])(const void* values, int64_t n, double* sums);
};

struct ProductLoops {
  // The keys of kTileRows rows with kWordBits columns, whose part of the right factor is packed by
  // `panel_columns` columns: element (p, j) is at (j / panel_columns * rank + p) * panel_columns +
  // j % panel_columns. A key is the bits of |x|.
  void (*compute_keys)(const float* const* rows, const float* panels, int64_t rank, uint32_t (*keys)[kWordBits]);
  // Bit j of words[i] is set if keys[j] >= bounds[i]. Keys are below 2^31, bounds are at most 2^31.
  void (*at_least)(const uint32_t* keys, const uint32_t (&bounds)[2], uint64_t (&words)[2]);
  int panel_columns;
};

// How many levels this machine has, and the name of one, the lowest first.
int level_count();
const char* level_name(int level);
// The level in use, at first the highest of this machine, and -1 if it has none.
int current_level();
// No op may run meanwhile.
void use_level(int level);

const StepLoops& step_loops();  // of the level in use
const ProductLoops& product_loops();

// By level; step_loops.cpp and product_loops.cpp.
extern const StepLoops kStepLoops[];
extern const ProductLoops kProductLoops[];

}  // namespace lift
