// Backward of depth_attention, without atomics: every sum has one owner and one order, so gradients
// repeat bit for bit.
//   weight(i, j)  = exp(score(i, j) - lse_i)
//   d_score(i, j) = weight(i, j) * (<grad_out_i, v_j> - delta_i)
//   grad_q_i      = scale * sum_j d_score(i, j) * k_j
//   grad_k_j      = scale * sum_i d_score(i, j) * q_i
//   grad_v_j      = sum_i weight(i, j) * grad_out_i
//   grad_bias_j   = sum_i d_score(i, j)
#pragma once

#include "depth_attention_fma_backward.cuh"
#include "depth_attention_mma_backward.cuh"

namespace mor {

// delta[h, i] = <grad_out, out> of the row. One warp per row (grid-stride), lanes share head_dim.
template <class T>
__global__ void depth_attention_delta_kernel(DepthAttention<T> p) {
  const int64_t rows = p.num_queries * p.num_heads, step = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t r = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; r < rows;
       r += step) {
    const int64_t query = r / p.num_heads;
    const int head = int(r % p.num_heads);
    const T *grad = p.grad_out.at(query, head), *out = p.forward_out.at(query, head);
    acc_t<T> sum = 0;
    for (int d = threadIdx.x % 32; d < p.head_dim; d += 32) sum += to_acc(grad[d]) * to_acc(out[d]);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % 32 == 0) p.delta[head * p.num_queries + query] = sum;
  }
}

// grad_key_bias[j] = the parts of all key heads, in their order. One thread per key (grid-stride).
template <class T>
__global__ void depth_attention_bias_kernel(DepthAttention<T> p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < p.num_keys; j += step) {
    acc_t<T> sum = 0;
    for (int h = 0; h < p.num_kv_heads; ++h) sum += p.grad_bias_parts[h * p.num_keys + j];
    p.grad_key_bias[j] = sum;
  }
}

// Nobody sees anything.
template <class T>
cudaError_t launch_zero_gradients(const DepthAttention<T>& p, cudaStream_t stream) {
  const auto zero = [&](void* gradient, int64_t bytes) {
    return bytes == 0 ? cudaSuccess : cudaMemsetAsync(gradient, 0, size_t(bytes), stream);
  };
  const int64_t row_bytes = int64_t(p.head_dim) * int64_t(sizeof(T));
  const int64_t bias_bytes = p.key_bias == nullptr ? 0 : int64_t(sizeof(acc_t<T>));
  const cudaError_t errors[] = {zero(p.grad_q, p.num_queries * p.num_heads * row_bytes),
                                zero(p.grad_k, p.num_keys * p.num_kv_heads * row_bytes),
                                zero(p.grad_v, p.num_keys * p.num_kv_heads * row_bytes),
                                zero(p.grad_key_bias, p.num_keys * bias_bytes)};
  for (cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t launch_depth_attention_backward(const DepthAttention<T>& p, cudaStream_t stream) {
  const int64_t rows = p.num_queries * p.num_heads;
  if (!fits_row_numbers(p)) return cudaErrorInvalidValue;
  if (rows == 0 || p.num_keys == 0) return launch_zero_gradients(p, stream);
  cudaError_t error = launch_depth_attention_key_ranges(p, stream);
  if (error != cudaSuccess) return error;
  MOR_LAUNCH(depth_attention_delta_kernel<T>, grid_for(rows, 4), 128, 0, stream, p);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  error = dispatch_head_dim(p.head_dim, [&]<int HEAD_DIM>() {
    const auto launch_both = [&](auto* grad_q, size_t grad_q_bytes, auto* grad_kv,
                                 size_t grad_kv_bytes, int grad_kv_threads, int tile_rows) {
      const cudaError_t error = launch_attention(
          grad_q, most_tiles(p.num_queries * p.group(), p.num_sequences, tile_rows), 128,
          grad_q_bytes, p, stream);
      if (error != cudaSuccess) return error;
      return launch_attention(grad_kv, most_tiles(p.num_keys, p.num_sequences, tile_rows),
                              grad_kv_threads, grad_kv_bytes, p, stream);
    };
    if constexpr (sizeof(T) == 2) {
      using Tile = AttentionMmaTile<HEAD_DIM>;
      return launch_both(depth_attention_mma_grad_q_kernel<T, HEAD_DIM>,
                         sizeof(AttentionMmaGradQSmem<T, HEAD_DIM>),
                         depth_attention_mma_grad_kv_kernel<T, HEAD_DIM>,
                         sizeof(AttentionMmaGradKvSmem<T, HEAD_DIM>), Tile::kGradKvThreads,
                         Tile::kRows);
    } else {
      using Smem = AttentionBackwardSmem<T, HEAD_DIM>;
      return launch_both(depth_attention_grad_q_kernel<T, HEAD_DIM>, sizeof(Smem),
                         depth_attention_grad_kv_kernel<T, HEAD_DIM>, sizeof(Smem), 128,
                         Smem::kQueries);
    }
  });
  if (error != cudaSuccess || p.key_bias == nullptr) return error;
  MOR_LAUNCH(depth_attention_bias_kernel<T>, grid_for(p.num_keys, 128), 128, 0, stream, p);
  return cudaGetLastError();
}

}  // namespace mor
