// Kernel of scatter_tokens_backward, one for each instruction set.
#pragma once

#include "csrc/cpu/rows/row_sums.h"
#include "csrc/cpu/simd/isa.h"

namespace mor {

// A null output is not asked for. Rows of outputs are packed.
struct ScatterBackward {
  ScalarType dtype;  // of grad, base, updates and their gradients
  int64_t width;
  const void* grad;
  int64_t grad_stride;
  const void* base;
  int64_t base_stride;
  const void* updates;
  int64_t updates_stride;
  RowScale gate, base_scale;
  void* grad_base;
  void* grad_updates;
  void* grad_gate;        // in the dtype of gate
  void* grad_base_scale;  // in the dtype of base_scale
  const RowEntries* entries;
  bool stream;  // write rows around the cache
};

// The gradients of updates and gate for entries [begin, end).
MOR_DECLARE_SIMD(void, scatter_backward_entries, const ScatterBackward& args, int64_t begin,
                 int64_t end)
// All gradients for rows [begin, end) and the entries on them: a row of grad is read once.
MOR_DECLARE_SIMD(void, scatter_backward_rows, const ScatterBackward& args, int64_t begin,
                 int64_t end)

}  // namespace mor
