// route_topk: the k best rows of every packed sequence (MoR paper, section 2.2.1, expert-choice).
//   scores          [N] float32, bfloat16, float16 (ranked on float32) or float64
//   k, k_each       rows to choose in a sequence: k for all, or k_each [B] int64 instead
//   cu_seqlens      [B + 1] int32: sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]
//   num_rows        number of rows returned, known to the host: sum(k) + protected rows
//   candidates      [N] bool, optional: only these rows may win
//   protected_rows  [N] bool, optional: always returned, in addition to the k best of the others
//   rows            [num_rows] int64, indices into the N rows, sequence after sequence
// Order: ascending, or with by_score best first inside each sequence (protected rows included).
// Ties: the smaller row wins. -0.0 equals +0.0, infinities are ordinary scores.
// A NaN that competes is an error on the CPU and the lowest score on CUDA; the score of a row that
// does not compete is not read, except that by_score orders protected rows (NaN last).
// Values checked on the CPU only: cu_seqlens rise from 0 to N, 0 <= k <= rows that compete,
// num_rows is the sum. On CUDA k is clamped, nothing is written beyond num_rows, and rows that the
// sequences do not fill are 0.
// Deterministic for any number of threads; not differentiable. Empty sequences, k = 0 and B = 0
// are ordinary.
#pragma once

#include <optional>

#include "../operands.h"

namespace mor {

struct RouteTopkDims {
  int64_t num_rows;       // N
  int64_t num_sequences;  // B
};

inline constexpr Operands kRouteTopkOperands{
    "route_topk",
    {{"scores", "[N]", "floating"},
     {"cu_seqlens", "[B + 1]", "int32"},
     {"k", "[B]", "int64", "(one for each sequence)"},
     {"candidates", "[N]", "bool", "(the rows of scores)"},
     {"protected_rows", "[N]", "bool", "(the rows of scores)"}}};

inline RouteTopkDims check_route_topk(const Tensor& scores, int64_t k,
                                      const std::optional<Tensor>& k_each, const Tensor& cu_seqlens,
                                      int64_t num_rows, const std::optional<Tensor>& candidates,
                                      const std::optional<Tensor>& protected_rows) {
  kRouteTopkOperands.check(
      {&scores, &cu_seqlens, pointer(k_each), pointer(candidates), pointer(protected_rows)});
  MOR_CHECK(k >= 0, "route_topk: expected k >= 0, got ", k);
  MOR_CHECK(num_rows >= 0, "route_topk: expected num_rows >= 0, got ", num_rows);
  return {scores.size(0), cu_seqlens.size(0) - 1};
}

}  // namespace mor
