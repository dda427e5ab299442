// segment_reduce: rows that share a destination become one (token merging).
//   x         [N, D] float32, bfloat16, float16 or float64; any strides, free of a copy where a row
//             is contiguous
//   segments  [N] int64, each in [0, num_segments); any order
//   reduce    "sum":  out[s] = sum of weights[i] * x[i] over segments[i] == s
//             "mean": that sum / totals[s], totals[s] the sum of weights[i]; 0 where totals[s] is 0
//             "amax": the largest x[i] of each column; a NaN is larger than every number
//   weights   [N], float32 or the dtype of x, optional (absent: 1); not with amax
//   out       [num_segments, D], contiguous; a segment without rows gives 0, amax too
//   totals    [num_segments] float32 (float64 for float64) for mean, else empty [0]
// Sums run in float32 (float64 for float64) in ascending order of rows and are rounded once, so the
// result is the same for any number of threads. Segments that never fall need no sort; others pay a
// counting sort, O(N + num_segments), on the CPU. A segment out of range is an error on the CPU and
// undefined on CUDA.
// Backward: of sum and mean scatter_tokens_backward is it, for x and weights. Of amax
// (segment_reduce_amax_backward): in each column grad[s] goes to the first row of segment s that
// equals out[s] (or is NaN, as out[s] is), the other rows get 0.
// The unmerge is gather_tokens(out, segments).
#pragma once

#include <optional>
#include <string>

#include "scatter_tokens.h"

namespace mor {

enum class Reduce { kSum, kMean, kAmax };

struct SegmentReduceDims {
  int64_t num_rows;      // N
  int64_t num_segments;  // S
  int64_t width;         // D
  Reduce reduce;
};

inline constexpr Operands kSegmentReduceOperands{"segment_reduce",
                                                 {{"x", "[N, D]", "floating"},
                                                  {"segments", "[N]", "int64", "(the rows of x)"},
                                                  {"weights", "[N]", "float32 or same"}}};

inline SegmentReduceDims check_segment_reduce(const Tensor& x, const Tensor& segments,
                                              int64_t num_segments, const std::string& reduce,
                                              const std::optional<Tensor>& weights) {
  const char* op = "segment_reduce";
  kSegmentReduceOperands.check({&x, &segments, pointer(weights)});
  MOR_CHECK(num_segments >= 0, op, ": expected num_segments >= 0, got ", num_segments);
  const bool amax = reduce == "amax";
  MOR_CHECK(amax || reduce == "sum" || reduce == "mean", op,
            ": expected reduce sum, mean or amax, got ", reduce);
  MOR_CHECK(!amax || !weights.has_value(), op, ": expected no weights with amax");
  return {x.size(0), num_segments, x.size(1),
          amax              ? Reduce::kAmax
          : reduce == "sum" ? Reduce::kSum
                            : Reduce::kMean};
}

inline constexpr Operands kSegmentReduceAmaxBackwardOperands{
    "segment_reduce_amax_backward",
    {{"grad", "[S, D]", "floating"},
     {"out", "[S, D]", "same"},
     {"x", "[N, D]", "same"},
     {"segments", "[N]", "int64", "(the rows of x)"}}};

inline SegmentReduceDims check_segment_reduce_amax_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& out,
                                                            const Tensor& segments) {
  kSegmentReduceAmaxBackwardOperands.check({&grad, &out, &x, &segments});
  return {x.size(0), grad.size(0), x.size(1), Reduce::kAmax};
}

}  // namespace mor
