// gather_tokens: y[i] = x[rows[i]].
//   x     [N, D], any dtype; any strides, free of a copy where a row is contiguous
//   rows  [K] int64, each in [0, N); any order, repeats allowed
//   y     [K, D], contiguous
// Backward (gather_tokens_backward): grad_x[n] = sum of grad[i] over rows[i] == n, accumulated in
// float32 (double for double) in the order of i, so it is deterministic for any thread count. Rows
// that never fall (those of route_topk) are summed in one pass that writes each row of grad_x once;
// others pay a counting sort, O(N + K), first. Empty inputs give empty outputs. A row out of range
// is an error on the CPU and undefined on CUDA. MoR paper, section 2.2.1.
#pragma once

#include "../operands.h"

namespace mor {

struct GatherTokensDims {
  int64_t num_rows;   // N
  int64_t num_taken;  // K
  int64_t width;      // D
};

inline constexpr Operands kGatherTokensOperands{"gather_tokens",
                                                {{"x", "[N, D]", "any"}, {"rows", "[K]", "int64"}}};

inline GatherTokensDims check_gather_tokens(const Tensor& x, const Tensor& rows) {
  kGatherTokensOperands.check({&x, &rows});
  return {x.size(0), rows.size(0), x.size(1)};
}

inline constexpr Operands kGatherTokensBackwardOperands{
    "gather_tokens_backward",
    {{"grad", "[K, D]", "floating"},
     {"rows", "[K]", "int64", "grad of {rows[0]} rows (the elements of rows)"}}};

inline GatherTokensDims check_gather_tokens_backward(const Tensor& grad, const Tensor& rows,
                                                     int64_t num_rows) {
  kGatherTokensBackwardOperands.check({&grad, &rows});
  MOR_CHECK(num_rows >= 0, "gather_tokens_backward: expected num_rows >= 0, got ", num_rows);
  return {num_rows, rows.size(0), grad.size(1)};
}

}  // namespace mor
