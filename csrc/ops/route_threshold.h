// route_threshold: the rows of every packed sequence that reach a threshold.
//   scores            [N] float32, bfloat16, float16 (compared in float32) or float64
//   threshold         of every sequence; for "absolute" it is rounded to the type in which scores
//                     are compared
//   threshold_each    [B] float32 or float64, optional: of each sequence, instead
//   cu_seqlens        [B + 1] int32: sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]
//   kind              which of the n rows that compete in a sequence pass:
//     "absolute"      score > threshold (inclusive: >=)
//     "quantile"      score > q (inclusive: >=), q = torch.quantile(scores, threshold) with linear
//                     interpolation. No rounding of q can matter, because nothing lies between two
//                     neighbours in order: with h = threshold * (n - 1), a product in the type of
//                     comparison as torch computes it, > q is > the floor(h)-th smallest score and
//                     >= q is >= the ceil(h)-th
//     "mass"          the scores are weights; the fewest best rows whose sum is at least
//                     threshold * (the sum of all). Sums are exact, so their order does not matter:
//                     weights are rounded to multiples of 2^(ilogb(largest) + ceil(log2(n)) - 50).
//                     Rows that add nothing are never needed
//   min_k, max_k      where fewer rows pass than min_k, the min_k best rows (or all) are chosen;
//                     where more than max_k, the max_k best; -1: no such bound
//   candidates        [N] bool, optional: only these rows compete
//   max_rows          rows returned, known to the host; absent: as many as are chosen
//   rows              int64, chosen rows, sequence after sequence, ascending; -1 past the last one
//   cu_seqlens (out)  [B + 1] int32: chosen rows of sequence b are rows[cu[b]] to rows[cu[b + 1]]
// What passes is always the c best rows for some c, ranked as route_topk does: of equal scores the
// smaller row first, -0.0 equal to +0.0, infinities ordinary (not as weights).
// Errors on the CPU: a NaN that competes; a weight that is negative or infinite; a threshold_each
// that is NaN or, but for "absolute", outside [0, 1]; cu_seqlens that decrease, or do not
// begin at 0 and end at N; more than max_rows rows. On CUDA NaN ranks lowest, such a weight counts
// as 0, thresholds are clamped, and rows beyond max_rows are dropped, in cu_seqlens too. Without
// max_rows, CUDA waits for the device once, to know how many rows there are; with it, never.
// Deterministic for any number of threads; not differentiable. Empty sequences choose nothing.
#pragma once

#include <optional>
#include <string>

#include "../operands.h"

namespace mor {

enum class ThresholdKind { kAbsolute, kQuantile, kMass };

struct RouteThresholdDims {
  int64_t num_rows;       // N
  int64_t num_sequences;  // B
  ThresholdKind kind;
};

inline constexpr Operands kRouteThresholdOperands{
    "route_threshold",
    {{"scores", "[N]", "floating"},
     {"cu_seqlens", "[B + 1]", "int32"},
     {"threshold", "[B]", "float32 or float64", "(one for each sequence)"},
     {"candidates", "[N]", "bool", "(the rows of scores)"}}};

inline RouteThresholdDims check_route_threshold(const Tensor& scores, double threshold,
                                                const std::optional<Tensor>& threshold_each,
                                                const Tensor& cu_seqlens, const std::string& kind,
                                                bool inclusive, int64_t min_k, int64_t max_k,
                                                const std::optional<Tensor>& candidates,
                                                std::optional<int64_t> max_rows) {
  const char* op = "route_threshold";
  kRouteThresholdOperands.check(
      {&scores, &cu_seqlens, pointer(threshold_each), pointer(candidates)});
  const bool absolute = kind == "absolute", mass = kind == "mass";
  MOR_CHECK(absolute || mass || kind == "quantile", op,
            ": expected kind absolute, quantile or mass, got ", kind);
  MOR_CHECK(!(mass && inclusive), op, ": expected kind absolute or quantile with inclusive");
  const bool each = threshold_each.has_value();
  MOR_CHECK(each || !absolute || threshold == threshold, op, ": expected threshold not to be nan");
  MOR_CHECK(each || absolute || (threshold >= 0 && threshold <= 1), op,
            ": expected threshold in [0, 1], got ", threshold);
  MOR_CHECK(min_k >= 0, op, ": expected min_k >= 0, got ", min_k);
  MOR_CHECK(max_k == -1 || max_k >= min_k, op, ": expected max_k >= min_k = ", min_k, ", got ",
            max_k);
  MOR_CHECK(!max_rows.has_value() || *max_rows >= 0, op, ": expected max_rows >= 0, got ",
            max_rows.value_or(0));
  return {scores.size(0), cu_seqlens.size(0) - 1,
          absolute ? ThresholdKind::kAbsolute
          : mass   ? ThresholdKind::kMass
                   : ThresholdKind::kQuantile};
}

// The place h of a quantile among n > 0 scores in ascending order, floor(h) or (up) ceil(h).
template <class Acc>
inline int64_t quantile_place(double quantile, int64_t n, bool up) {
  const Acc h = static_cast<Acc>(quantile) * static_cast<Acc>(n - 1);
  const auto below = static_cast<int64_t>(h);
  const int64_t place = below + (up && static_cast<Acc>(below) < h);
  return place < n - 1 ? place : n - 1;
}

}  // namespace mor
