// y[i] = x[rows[i]] over rows of bytes; grad_x[n] = sum of grad[i] with rows[i] == n.
#pragma once

#include "common.cuh"

namespace mor {

// One block, one output row at a time (grid-stride); threads own 16-byte (or smaller) chunks of it.
template <class Chunk>
__global__ void gather_tokens_kernel(const char* x, const int64_t* rows, char* y, int64_t num_taken,
                                     int64_t stride, int64_t bytes) {
  for (int64_t i = blockIdx.x; i < num_taken; i += gridDim.x) {
    const Chunk* in = reinterpret_cast<const Chunk*>(x + rows[i] * stride);
    Chunk* out = reinterpret_cast<Chunk*>(y + i * bytes);
    for (int64_t c = threadIdx.x; c < bytes / int64_t(sizeof(Chunk)); c += blockDim.x)
      out[c] = in[c];
  }
}

inline cudaError_t launch_gather_tokens(const void* x, const int64_t* rows, void* y,
                                        int64_t num_taken, int64_t stride, int64_t bytes,
                                        cudaStream_t stream) {
  if (num_taken == 0 || bytes == 0) return cudaSuccess;
  const auto* in = static_cast<const char*>(x);
  auto* out = static_cast<char*>(y);
  const bool wide = (reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out) |
                     uintptr_t(stride) | uintptr_t(bytes)) %
                        16 ==
                    0;
  if (wide) {
    MOR_LAUNCH(gather_tokens_kernel<uint4>, grid_for(num_taken, 1), 128, 0, stream, in, rows, out,
               num_taken, stride, bytes);
  } else {
    MOR_LAUNCH(gather_tokens_kernel<char>, grid_for(num_taken, 1), 128, 0, stream, in, rows, out,
               num_taken, stride, bytes);
  }
  return cudaGetLastError();
}

}  // namespace mor
