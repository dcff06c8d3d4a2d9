// Which level of instruction sets this machine has, and which one is in use.
#include "levels.h"

namespace lift {
namespace {

#if defined(__x86_64__)
// The names of the x86-64 psABI. What is asked here is what LIFT_TARGET of each_level.h allows.
constexpr const char* kNames[] = {"x86-64-v2", "x86-64-v3", "x86-64-v4"};

int machine_levels() {
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return int(v2) + int(v3) + int(v4);
}
#else
#if defined(__aarch64__)
constexpr const char* kNames[] = {"aarch64"};
#else
constexpr const char* kNames[] = {"generic"};
#endif

int machine_levels() { return 1; }
#endif

const int kLevels = machine_levels();
int level = kLevels - 1;

}  // namespace

int level_count() { return kLevels; }
const char* level_name(int number) { return kNames[number]; }
int current_level() { return level; }
void use_level(int number) { level = number; }

const StepLoops& step_loops() { return kStepLoops[level]; }
const ProductLoops& product_loops() { return kProductLoops[level]; }

}  // namespace lift
