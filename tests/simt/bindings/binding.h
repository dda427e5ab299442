// How a launcher of kernels/OP.cuh is exposed to Python (simt.py, by ctypes): a C function on raw
// pointers that returns 0, or 1 and leaves the reason in simt_error().
#pragma once

#include <cuda_runtime_api.h>

#include <exception>
#include <string>

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {

std::string& last_error();

template <class Body>
int guarded(Body&& body) {
  try {
    if (const cudaError_t error = body(); error != cudaSuccess) {
      last_error() = "CUDA error " + std::to_string(int(error));
      return 1;
    }
    return 0;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return 1;
  }
}

// As kernels/glue.h dispatches; the codes are those of simt.py. SIMT_DTYPE: only this one is
// compiled, for test_simt_mutations.py.
template <class Body>
cudaError_t dispatch_floating(int64_t dtype, Body&& body) {
#if defined(SIMT_DTYPE)
  return dtype == SIMT_DTYPE ? body(SIMT_ELEMENT{}) : cudaErrorNotSupported;
#else
  switch (dtype) {
    case 0:
      return body(float{});
    case 1:
      return body(__nv_bfloat16{});
    case 2:
      return body(__half{});
    default:
      return body(double{});
  }
#endif
}

}  // namespace simt
