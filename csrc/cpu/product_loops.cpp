// The loops over a low-rank product, for each level of instruction sets.
//
// Multiply-adds are fused where the machine has them: products must agree between sweeps, but not
// between machines. Instructions are not scheduled before registers are given out, where that is
// GCC's habit: on aarch64 it spilled half the sums of a tile. The pragma stands before everything
// else, so that no function is inlined into one with other options.
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast", "no-schedule-insns")
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "levels.h"

#define LIFT_FUNCTIONS "product_functions.h"
#include "each_level.h"

namespace lift {

#if defined(__x86_64__)
const ProductLoops kProductLoops[] = {v2::loops, v3::loops, v4::loops};
#else
const ProductLoops kProductLoops[] = {base::loops};
#endif

}  // namespace lift
