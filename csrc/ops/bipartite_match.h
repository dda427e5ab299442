// bipartite_match: for every row of a its most similar row of b, of the same sequence (token
// merging).
//   a, b          [Na, D], [Nb, D], one dtype of float32, bfloat16, float16, float64; any strides,
//                 free of a copy where a row is contiguous
//   cu_seqlens_a, cu_seqlens_b   [B + 1] int32: sequence s owns rows cu[s] to cu[s + 1] of each
//   metric        "dot": <a_i, b_j>; "cosine": <a_i, b_j> / (|a_i| |b_j|), 0 where a norm is 0
//   scores        [Na] float32 (float64 for float64): the largest similarity of each row of a
//   index         [Na] int64: the row of b that has it
// Products and norms are of the values as given, summed in float32 (float64 for float64): bfloat16
// rows are not rounded again when they are normalised. Of equal similarities the smaller row of b
// wins, and equal rows of b have equal ones, bit for bit. A NaN never wins. A row of a without a
// row of b in its sequence (or with NaN alone) has score -inf and index -1. Values whose squares
// overflow float32, or vanish in it, have no meaning for cosine.
// Memory: O(Na) results, on CUDA O(Na + Nb) norms too; no matrix of similarities.
// The same result for any number of threads. On the CPU cu_seqlens that do not rise from 0 to the
// number of rows are an error; on CUDA they are clamped.
// index is not differentiable; scores are, to a and b through the chosen pair (gather_tokens and
// scatter_tokens, in mor/ops/bipartite_match.py).
#pragma once

#include <string>

#include "../operands.h"

namespace mor {

struct BipartiteMatchDims {
  int64_t num_a, num_b, width, num_sequences;
  bool cosine;
};

inline constexpr Operands kBipartiteMatchOperands{
    "bipartite_match",
    {{"a", "[Na, D]", "floating"},
     {"b", "[Nb, D]", "same", "b of width {a[1]} (that of a)"},
     {"cu_seqlens_a", "[B + 1]", "int32"},
     {"cu_seqlens_b", "[B + 1]", "int32", "(those of cu_seqlens_a)"}}};

inline BipartiteMatchDims check_bipartite_match(const Tensor& a, const Tensor& b,
                                                const Tensor& cu_seqlens_a,
                                                const Tensor& cu_seqlens_b,
                                                const std::string& metric) {
  kBipartiteMatchOperands.check({&a, &b, &cu_seqlens_a, &cu_seqlens_b});
  MOR_CHECK(metric == "dot" || metric == "cosine",
            "bipartite_match: expected metric cosine or dot, got ", metric);
  return {a.size(0), b.size(0), a.size(1), cu_seqlens_a.size(0) - 1, metric == "cosine"};
}

}  // namespace mor
