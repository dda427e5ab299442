// What the kernels of depth_attention share: the operands as raw pointers, one task, the entries of
// each instruction set. No standard-library templates here: an inline function compiled for AVX-512
// must not become the one that every machine runs.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd/isa.h"
#include "csrc/cpu/tuning.h"
#include "csrc/ops/depth_attention.h"

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
  int64_t window;  // positions that a query sees, its own included; 0: all before it
  void* lse;       // [H, Nq] Acc, written by the forward

  void* out_data;  // forward, [Nq, H, hd]
  void *grad_q, *grad_k, *grad_v, *grad_key_bias;
};

// Rows [row_begin, row_end) of one sequence and of `kv_heads` key heads, counted over its queries
// and, inside a query, over the heads that share the key head.
struct AttentionTask {
  int64_t sequence, kv_head, kv_heads, row_begin, row_end;
};

// Does the task; with scratch null does nothing. Returns the bytes of scratch that it needs,
// aligned to 64.
MOR_DECLARE_SIMD(int64_t, attention_forward, const AttentionProblem& p, const AttentionTask& task,
                 char* scratch)

// Gradients of the keys from some rows: [keys of the sequence][head_dim rounded up to 16] each, and
// [keys of the sequence] for the bias.
struct KeyGradients {
  float *k, *v, *bias;
};

// As attention_forward; writes the task's rows of grad_q and `sums`.
MOR_DECLARE_SIMD(int64_t, attention_backward, const AttentionProblem& p, const AttentionTask& task,
                 const KeyGradients& sums, char* scratch)

// Adds up `count` sums, each `stride` (`bias_stride`) floats after the last, for one sequence and
// key head; writes grad_k and grad_v, and the total of the bias to sums.bias.
MOR_DECLARE_SIMD(void, attention_sum_keys, const AttentionProblem& p, int64_t sequence,
                 int64_t kv_head, const KeyGradients& sums, int64_t count, int64_t stride,
                 int64_t bias_stride)

}  // namespace mor
