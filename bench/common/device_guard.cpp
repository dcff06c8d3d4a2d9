// A CUDA device guard that does nothing. torch's own one comes with a CUDA build alone, and indexing
// of a fake CUDA tensor needs one. fake_cuda.py puts it in and takes it out again.

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplInterface* before = nullptr;

auto& slot() {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
}
} // namespace

extern "C" void put_in() {
  before = slot().exchange(&guard);
}

extern "C" void take_out() {
  slot() = before;
}
