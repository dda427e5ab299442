// Forward of depth_attention: the kernel for each type.
#pragma once

#include "depth_attention_fma_forward.cuh"
#include "depth_attention_mma_forward.cuh"

namespace mor {

template <class T>
cudaError_t launch_depth_attention(const DepthAttention<T>& p, cudaStream_t stream) {
  if (p.num_queries == 0 || p.num_heads == 0) return cudaSuccess;
  if (!fits_row_numbers(p)) return cudaErrorInvalidValue;
  const cudaError_t error = launch_depth_attention_key_ranges(p, stream);
  if (error != cudaSuccess) return error;
  return dispatch_head_dim(p.head_dim, [&]<int HEAD_DIM>() {
    const auto tiles = [&](int tile_rows) {
      return most_tiles(p.num_queries * p.group(), p.num_sequences, tile_rows);
    };
    if constexpr (sizeof(T) == 2) {
      using Smem = AttentionMmaForwardSmem<T, HEAD_DIM>;
      return launch_attention(depth_attention_mma_forward_kernel<T, HEAD_DIM>,
                              tiles(Smem::kQueries), 128, sizeof(Smem), p, stream);
    } else {
      using Smem = AttentionForwardSmem<T, HEAD_DIM>;
      return launch_attention(depth_attention_forward_kernel<T, HEAD_DIM>, tiles(Smem::kQueries),
                              128, sizeof(Smem), p, stream);
    }
  });
}

}  // namespace mor
