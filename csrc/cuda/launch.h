// What every launch needs: the device, the grid size and the kernel for a dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../launchers.h"

namespace lift {

constexpr int kThreads = 256;

inline unsigned blocks_for(int64_t n) { return unsigned(std::min<int64_t>((n + kThreads - 1) / kThreads, 1 << 16)); }

// Makes the device of a stream the current device, as launches require, and restores the old one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous_);
    if (previous_ != device) cudaSetDevice(device);
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t cuda_stream(DeviceStream stream) { return static_cast<cudaStream_t>(stream.handle); }

template <class F>
void dispatch_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(float{});
  else if (dtype == DType::bf16) f(__nv_bfloat16{});
  else f(__half{});
}

}  // namespace lift
