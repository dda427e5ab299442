// Shared by the .cu glue files: device guard, current stream, launch check, dtype dispatch to
// CUDA's types.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../csrc/tensors.h"
#include "common.cuh"

#if defined(MOR_SIMT)
#include "operators.h"  // of tests/simt/harness
#else
#define MOR_DEVICE_KEY CUDA

// Weak: only a CUDA build of libtorch exports it. With a CPU torch the library still loads and
// registers, and the CUDA implementation can never be reached, because no CUDA tensor can exist.
// (For the same reason no STD_CUDA_CHECK.)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace mor {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  MOR_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
            "mor: no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mor
#endif

namespace mor {

inline void check_launch(cudaError_t error, const char* op) {
  MOR_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

// As dispatch_floating, with CUDA's half types.
template <class Body>
void dispatch_floating_cuda(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    case ScalarType::Half:
      return body(__half{});
    default:
      return body(double{});
  }
}

}  // namespace mor
