// Includes LIFT_FUNCTIONS, a file name, once for each level of instruction sets of this
// architecture. The file defines its functions in namespace lift::LIFT_LEVEL and marks them with
// LIFT_TARGET, so one binary holds them for all levels and `levels.h` picks one.
//
// Only these functions may use the instructions of a level. A file compiled with -march would put
// them into inline functions of headers, too. The linker keeps one copy of those, and an older
// machine would crash in it. For the same reason nothing here has external linkage.
//
// LIFT_LANES: floats in a register. LIFT_TILE_VECTORS: registers in a row of a tile of a product.
// With kTileRows rows, the sums of a tile fill 12 of the 16 registers of v2 and v3, or 24 of the 32
// of v4 and aarch64.
#if defined(__x86_64__)

#define LIFT_LEVEL v2
#define LIFT_TARGET __attribute__((target("sse4.2,popcnt")))
#define LIFT_LANES 4
#define LIFT_TILE_VECTORS 2
#include LIFT_FUNCTIONS
#undef LIFT_LEVEL
#undef LIFT_TARGET
#undef LIFT_LANES
#undef LIFT_TILE_VECTORS

#define LIFT_LEVEL v3
#define LIFT_TARGET __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
#define LIFT_LANES 8
#define LIFT_TILE_VECTORS 2
#include LIFT_FUNCTIONS
#undef LIFT_LEVEL
#undef LIFT_TARGET
#undef LIFT_LANES
#undef LIFT_TILE_VECTORS

#define LIFT_LEVEL v4
#define LIFT_TARGET __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,fma,bmi,bmi2,popcnt")))
#define LIFT_LANES 16
#define LIFT_TILE_VECTORS 4
#include LIFT_FUNCTIONS
#undef LIFT_LEVEL
#undef LIFT_TARGET
#undef LIFT_LANES
#undef LIFT_TILE_VECTORS

#else  // one level, which every machine has

#define LIFT_LEVEL base
#define LIFT_TARGET
#define LIFT_LANES 4
#define LIFT_TILE_VECTORS 4
#include LIFT_FUNCTIONS
#undef LIFT_LEVEL
#undef LIFT_TARGET
#undef LIFT_LANES
#undef LIFT_TILE_VECTORS

#endif
