// What the kernels of depth_attention share: the operands as raw pointers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../ops/depth_attention.h"
#include "simd/isa.h"

namespace mor {

// A [rows, heads, head_dim] operand; strides in elements, the last one is 1.
struct AttentionOperand {
  const void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;

  template <class T>
  const T* at(int64_t row, int64_t head) const {
    return static_cast<const T*>(data) + row * row_stride + head * head_stride;
  }
};

// Acc is float, or double for float64. Outputs are contiguous.
struct AttentionProblem {
  DepthAttentionDims dims;
  int64_t group;  // query heads for each key head
  AttentionOperand q, k, v, out, grad_out;
  const int64_t *q_positions, *k_positions;
  const int32_t *cu_q, *cu_k;
  const int32_t *q_depths, *k_depths;  // null: no depths
  const void* key_bias;                // [Nk] Acc, null: none
  bool causal;
  double scale;
  void* lse;  // [H, Nq] Acc, written by the forward

  void* out_data;  // forward, [Nq, H, hd]
  void *grad_q, *grad_k, *grad_v, *grad_key_bias;

  // First key of sequence b that a query at `position` cannot see for its position.
  int64_t key_end(int64_t b, int64_t position) const {
    if (!causal) return cu_k[b + 1];
    return std::upper_bound(k_positions + cu_k[b], k_positions + cu_k[b + 1], position) -
           k_positions;
  }
};

}  // namespace mor
