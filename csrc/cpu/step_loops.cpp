// The loops of a step, for each level of instruction sets. All levels give the same bits, because of
// -ffp-contract=off.
#include "adamw_update.h"
#include "levels.h"

#define LIFT_FUNCTIONS "step_functions.h"
#include "each_level.h"

namespace lift {

#if defined(__x86_64__)
const StepLoops kStepLoops[] = {v2::loops, v3::loops, v4::loops};
#else
const StepLoops kStepLoops[] = {base::loops};
#endif

}  // namespace lift
