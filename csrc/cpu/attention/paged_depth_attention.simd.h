// What the kernels of paged_depth_attention share, in the manner of depth_attention.simd.h, of
// which they use the parts.
#pragma once

#include "csrc/cpu/attention/depth_attention.simd.h"
#include "csrc/ops/paged_depth_attention.h"

namespace mor {

// A [num_blocks, block_size, kv_heads, head_dim] cache; strides in elements, the last one is 1.
struct PagedCache {
  const void* data = nullptr;
  int64_t block_stride = 0, row_stride = 0, head_stride = 0;
};

struct PagedProblem {
  AttentionProblem queries;  // dims, dtype, group, q, cu_q, scale, out_data, lse; no keys
  PagedCache k, v;
  const int32_t* block_table;  // [B, max_blocks]
  int64_t max_blocks, block_size;
  const int32_t *context_lens, *context_starts;  // the latter may be null
};

// Some rows of an entry (`rows.sequence`) on its keys [key_begin, key_end).
struct PagedTask {
  AttentionTask rows;
  int64_t key_begin, key_end;

  int64_t num_rows() const { return rows.kv_heads * (rows.row_end - rows.row_begin); }
};

// A part is the result of a task, to be merged with those of other keys: for each row, key head
// after key head, the sum of weighted values [head_dim], the score (in units of log2) whose weight
// is 1 in it, and the sum of weights.
inline int64_t part_stride(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }

// Does the task and writes its part; with scratch null does nothing. Returns the bytes of scratch
// that it needs, aligned to 64.
MOR_DECLARE_SIMD(int64_t, paged_part, const PagedProblem& p, const PagedTask& task, float* part,
                 char* scratch)

// Merges `count` parts of the same rows, in their order, into out and lse.
MOR_DECLARE_SIMD(void, paged_merge, const PagedProblem& p, const AttentionTask& rows,
                 const float* parts, int64_t count)

}  // namespace mor
