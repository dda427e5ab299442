// y[i] = x[rows[i]] over rows of bytes; grad_x[n] = sum of grad[i] with rows[i] == n.
#pragma once

#include "row_sums.cuh"

namespace mor {

// x [N, stride bytes], y [K, chunks]. A warp owns one output row at a time (grid-stride), a lane
// every 32nd chunk of it, four in flight.
template <class Chunk>
__global__ void __launch_bounds__(kRowThreads)
    gather_tokens_kernel(const char* x, const int64_t* rows, char* y, int64_t num_taken,
                         int64_t stride, int64_t chunks) {
  constexpr int kInFlight = 4;
  const int lane = threadIdx.x % 32;
  for (int64_t i = row_item(); i < num_taken; i += row_item_step()) {
    const Chunk* in = reinterpret_cast<const Chunk*>(x + rows[i] * stride);
    Chunk* out = reinterpret_cast<Chunk*>(y) + i * chunks;
    int64_t c = lane;
    for (; c + 32 * (kInFlight - 1) < chunks; c += 32 * kInFlight) {
      Chunk held[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) held[k] = in[c + 32 * k];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) out[c + 32 * k] = held[k];
    }
    for (; c < chunks; c += 32) out[c] = in[c];
  }
}

// stride and bytes of a row in bytes.
inline cudaError_t launch_gather_tokens(const void* x, const int64_t* rows, void* y,
                                        int64_t num_taken, int64_t stride, int64_t bytes,
                                        cudaStream_t stream) {
  if (num_taken == 0 || bytes == 0) return cudaSuccess;
  const auto* in = static_cast<const char*>(x);
  auto* out = static_cast<char*>(y);
  const uintptr_t bits = reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out) |
                         uintptr_t(stride) | uintptr_t(bytes);
  const auto launch = [&](auto chunk) {
    using Chunk = decltype(chunk);
    const auto kernel = gather_tokens_kernel<Chunk>;
    MOR_LAUNCH(kernel, row_grid(num_taken), kRowThreads, 0, stream, in, rows, out, num_taken,
               stride, bytes / int64_t(sizeof(Chunk)));
  };
  if (bits % 16 == 0) {
    launch(uint4{});
  } else if (bits % 4 == 0) {
    launch(uint32_t{});
  } else if (bits % 2 == 0) {
    launch(uint16_t{});
  } else {
    launch(uint8_t{});
  }
  return cudaGetLastError();
}

// grad [K, D] with grad_stride elements between rows, grad_x [N, D], scratch [2 N] int.
template <class T>
cudaError_t launch_gather_tokens_backward(const T* grad, int64_t grad_stride, const int64_t* rows,
                                          T* grad_x, int* scratch, int64_t num_rows,
                                          int64_t num_taken, int64_t width, cudaStream_t stream) {
  RowSums<T> sums{};
  sums.out = grad_x;
  sums.out_stride = width;
  sums.updates = grad;
  sums.updates_stride = grad_stride;
  sums.rows = rows;
  sums.num_rows = num_rows;
  sums.num_updates = num_taken;
  sums.width = width;
  return launch_row_sums(sums, scratch, stream);
}

}  // namespace mor
