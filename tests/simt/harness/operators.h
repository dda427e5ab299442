// What kernels/glue.h takes from CUDA: here the operators of mor for the CPU key, whose tensors the
// kernels then compute on. One device, one stream, which is there only under a guard: on a machine
// with several GPUs an operator without one would run on whichever is current.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>

#define MOR_DEVICE_KEY CPU

namespace mor {

struct DeviceGuard {
  static inline thread_local int alive = 0;
  explicit DeviceGuard(int32_t) { ++alive; }
  ~DeviceGuard() { --alive; }
  DeviceGuard(const DeviceGuard&) = delete;
};

template <class AnyTensor>
cudaStream_t current_stream(const AnyTensor&) {
  if (DeviceGuard::alive == 0) throw std::runtime_error("simt: a stream without a device guard");
  return nullptr;
}

}  // namespace mor
