// Launches of the packed ops on a CUDA stream.
#include "launch.h"
#include "packed_ops.cuh"

namespace lift {

int packed_gather_cuda(const void* source, DType from, const int32_t* indices, int64_t k, void* out, DType to,
                       DeviceStream stream) {
  if (k == 0) return 0;
  dispatch_dtype(from, [&](auto a) {
    dispatch_dtype(to, [&](auto b) {
      cuda::packed_gather_kernel<<<blocks_for(k), kThreads, 0, cuda_stream(stream)>>>(
          static_cast<const decltype(a)*>(source), indices, k, static_cast<decltype(b)*>(out));
    });
  });
  return int(cudaGetLastError());
}

int packed_scatter_cuda(void* dest, DType to, const int32_t* indices, int64_t k, const void* values, DType from,
                        DeviceStream stream) {
  if (k == 0) return 0;
  dispatch_dtype(from, [&](auto a) {
    dispatch_dtype(to, [&](auto b) {
      cuda::packed_scatter_kernel<<<blocks_for(k), kThreads, 0, cuda_stream(stream)>>>(
          static_cast<decltype(b)*>(dest), indices, k, static_cast<const decltype(a)*>(values));
    });
  });
  return int(cudaGetLastError());
}

int packed_migrate_cuda(const void* values, int width, const int32_t* old_indices, int64_t k_old,
                        const int32_t* new_indices, int64_t k_new, void* out, DeviceStream stream) {
  if (k_new == 0) return 0;
  const auto launch = [&](auto type) {
    using T = decltype(type);
    cuda::packed_migrate_kernel<<<blocks_for(k_new), kThreads, 0, cuda_stream(stream)>>>(
        static_cast<const T*>(values), old_indices, k_old, new_indices, k_new, static_cast<T*>(out));
  };
  if (width == 4) launch(uint32_t{});
  else launch(uint16_t{});
  return int(cudaGetLastError());
}

int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : CUDART_VERSION;
}

bool cuda_has_code() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, cuda::packed_migrate_kernel<uint32_t>) == cudaSuccess;
  cudaGetLastError();  // clears the error, so that the next launch does not report it
  return found;
}

int cuda_driver_version() {
  int version = 0;  // stays 0 if there is no driver
  cudaDriverGetVersion(&version);
  return version;
}

}  // namespace lift
