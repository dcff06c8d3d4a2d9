// What every launch needs: the stream, the grid size and the kernel for a dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "../launchers.h"

namespace lift {

constexpr int kThreads = 256;

inline unsigned blocks_for(int64_t n) { return unsigned(std::min<int64_t>((n + kThreads - 1) / kThreads, 1 << 16)); }

// The stream to launch on, after its device was made current. The caller holds torch's guard, which
// makes the old device current again. This library has a CUDA runtime of its own, so it does not
// ask that one which device is current for torch.
inline cudaStream_t cuda_stream(DeviceStream stream) {
  cudaSetDevice(stream.device);
  return static_cast<cudaStream_t>(stream.handle);
}

template <class F>
void dispatch_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) f(float{});
  else if (dtype == DType::bf16) f(__nv_bfloat16{});
  else f(__half{});
}

}  // namespace lift
