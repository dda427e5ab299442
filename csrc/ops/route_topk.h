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

#include "../checks.h"

namespace mor {

struct RouteTopkDims {
  int64_t num_rows;       // N
  int64_t num_sequences;  // B
};

inline RouteTopkDims check_route_topk(const Tensor& scores, int64_t k,
                                      const std::optional<Tensor>& k_each, const Tensor& cu_seqlens,
                                      int64_t num_rows, const std::optional<Tensor>& candidates,
                                      const std::optional<Tensor>& protected_rows) {
  const char* op = "route_topk";
  check_dim(scores, 1, op, "scores", "[N]");
  check_floating(scores, op, "scores");
  check_dim(cu_seqlens, 1, op, "cu_seqlens", "[B + 1]");
  check_dtype(cu_seqlens, ScalarType::Int, op, "cu_seqlens");
  check_same_device(cu_seqlens, scores, op, "cu_seqlens");
  MOR_CHECK(cu_seqlens.size(0) >= 1, op, ": expected cu_seqlens of at least one element, got [0]");
  const RouteTopkDims dims{scores.size(0), cu_seqlens.size(0) - 1};
  MOR_CHECK(k >= 0, op, ": expected k >= 0, got ", k);
  if (k_each.has_value()) {
    check_dim(*k_each, 1, op, "k", "[B]");
    check_dtype(*k_each, ScalarType::Long, op, "k");
    check_same_device(*k_each, scores, op, "k");
    MOR_CHECK(k_each->size(0) == dims.num_sequences, op, ": expected k of ", dims.num_sequences,
              " elements (one for each sequence), got ", shape_str(*k_each));
  }
  MOR_CHECK(num_rows >= 0, op, ": expected num_rows >= 0, got ", num_rows);
  if (candidates.has_value()) check_row_mask(*candidates, scores, op, "candidates");
  if (protected_rows.has_value()) check_row_mask(*protected_rows, scores, op, "protected_rows");
  return dims;
}

}  // namespace mor
