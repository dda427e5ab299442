// What the kernels of depth_attention share: the operands as raw pointers, one task, the entries of
// each instruction set. No standard-library templates here: an inline function compiled for AVX-512
// must not become the one that every machine runs.
#pragma once

#include <cstdint>

#include "../ops/depth_attention.h"
#include "simd/isa.h"

namespace mor {

// A [rows, heads, head_dim] operand; strides in elements, the last one is 1.
struct AttentionOperand {
  const void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0;

  template <class T>
  [[gnu::always_inline]] const T* at(int64_t row, int64_t head) const {
    return static_cast<const T*>(data) + row * row_stride + head * head_stride;
  }
};

// "Acc" is float, or double for float64. Outputs are contiguous.
struct AttentionProblem {
  DepthAttentionDims dims;
  ScalarType dtype;
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
};

// The queries [q_begin, q_end) of one sequence, for the query heads of one key head.
struct AttentionTask {
  int64_t sequence, kv_head, q_begin, q_end;
};

// Rows of a task (queries times heads of the group) lie in vector lanes, in this number at most
// unless the group alone is larger.
constexpr int64_t kForwardRows = 256;

// Does the task; with scratch null does nothing. Returns the bytes of scratch that it needs,
// aligned to 64.
MOR_DECLARE_SIMD(int64_t, attention_forward, const AttentionProblem& p, const AttentionTask& task,
                 char* scratch)

}  // namespace mor
