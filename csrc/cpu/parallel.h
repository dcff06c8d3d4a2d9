// Calls a lambda over ranges through the function pointer ParallelFor of launchers.h.
#pragma once

#include "../launchers.h"

namespace lift {

// Without `parallel_for` one range is done by the calling thread.
template <class F>
void for_ranges(ParallelFor parallel_for, int64_t n, const F& f) {
  if (parallel_for == nullptr) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  parallel_for(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace lift
