// What kernels/glue.h takes from CUDA: here the operators of mor for the CPU key, whose tensors the
// kernels then compute on. One device, one stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#define MOR_DEVICE_KEY CPU

namespace mor {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

template <class AnyTensor>
cudaStream_t current_stream(const AnyTensor&) {
  return nullptr;
}

}  // namespace mor
