// scatter_tokens: out = base_scale * base, then out[rows[i]] += gate[i] * updates[i].
//   base        [N, D] float32, bfloat16, float16 or float64
//   updates     [K, D] as base
//   rows        [K] int64, each in [0, N); any order, repeats allowed
//   gate        [K], optional, float32 or the dtype of base; absent: 1
//   base_scale  [N], optional, float32 or the dtype of base; absent: 1
//   out         [N, D] contiguous; scatter_tokens_ writes base instead
// Any strides, free of a copy where a row is contiguous. One pass: float32 accumulation (double for
// double), repeated rows in the order of i, one rounding; so the result is the same for any number
// of threads (on avx512_bf16 the rounding to bfloat16 makes subnormals zero). Non-decreasing rows
// (those of route_topk) need no sort; others pay a counting sort, O(N + K), on the CPU. The
// in-place form touches only the rows of the index unless base_scale is given, and is the fast
// form: a fresh result costs more than the sum. Its other operands must not share memory with base.
// Empty inputs give base. A row out of range is an error on the CPU and undefined on CUDA.
// Backward (scatter_tokens_backward), each gradient only where it is asked for, else empty [0]:
//   grad_base[n]       = base_scale[n] * grad[n]       need_base and base_scale present (absent, it
//                                                      is grad itself: the caller has it)
//   grad_updates[i]    = gate[i] * grad[rows[i]]       need_updates
//   grad_gate[i]       = <grad[rows[i]], updates[i]>   updates present; in the dtype of gate
//   grad_base_scale[n] = <grad[n], base[n]>            base present; in the dtype of base_scale
// The in-place form has no gradient. MoR paper, section 2.2.1 (H += g * f(H)).
#pragma once

#include <optional>

#include "gather_tokens.h"

namespace mor {

struct ScatterTokensDims {
  int64_t num_rows;     // N
  int64_t num_updates;  // K
  int64_t width;        // D
};

inline constexpr Operand kScatterTokensList[] = {{"base", "[N, D]", "floating"},
                                                 {"rows", "[K]", "int64"},
                                                 {"updates", "[K, D]", "same"},
                                                 {"gate", "[K]", "float32 or same"},
                                                 {"base_scale", "[N]", "float32 or same"}};
inline constexpr Operands kScatterTokensOperands{"scatter_tokens", kScatterTokensList};
inline constexpr Operands kScatterTokensInPlaceOperands{"scatter_tokens_", kScatterTokensList};

inline ScatterTokensDims check_scatter_tokens(const Tensor& base, const Tensor& updates,
                                              const Tensor& rows, const std::optional<Tensor>& gate,
                                              const std::optional<Tensor>& base_scale,
                                              const Operands& operands = kScatterTokensOperands) {
  operands.check({&base, &rows, &updates, pointer(gate), pointer(base_scale)});
  return {base.size(0), rows.size(0), base.size(1)};
}

inline ScatterTokensDims check_scatter_tokens_(const Tensor& base, const Tensor& updates,
                                               const Tensor& rows,
                                               const std::optional<Tensor>& gate,
                                               const std::optional<Tensor>& base_scale) {
  const auto dims =
      check_scatter_tokens(base, updates, rows, gate, base_scale, kScatterTokensInPlaceOperands);
  const bool expanded = base.numel() > 0 && ((base.size(0) > 1 && base.stride(0) == 0) ||
                                             (base.size(1) > 1 && base.stride(1) == 0));
  MOR_CHECK(!expanded,
            "scatter_tokens_: expected base whose elements do not share memory, got strides [",
            base.stride(0), ", ", base.stride(1), "]");
  return dims;
}

inline constexpr Operands kScatterTokensBackwardOperands{
    "scatter_tokens_backward",
    {{"grad", "[N, D]", "floating"},
     {"rows", "[K]", "int64"},
     {"base", "[N, D]", "same"},
     {"updates", "[K, D]", "same"},
     {"gate", "[K]", "float32 or same"},
     {"base_scale", "[N]", "float32 or same"}}};

inline ScatterTokensDims check_scatter_tokens_backward(const Tensor& grad,
                                                       const std::optional<Tensor>& base,
                                                       const std::optional<Tensor>& updates,
                                                       const Tensor& rows,
                                                       const std::optional<Tensor>& gate,
                                                       const std::optional<Tensor>& base_scale) {
  const char* op = "scatter_tokens_backward";
  kScatterTokensBackwardOperands.check(
      {&grad, &rows, pointer(base), pointer(updates), pointer(gate), pointer(base_scale)});
  MOR_CHECK(gate.has_value() || !updates.has_value(), op,
            ": expected gate with updates (they ask for its gradient), got none");
  MOR_CHECK(base_scale.has_value() || !base.has_value(), op,
            ": expected base_scale with base (it asks for its gradient), got none");
  return {grad.size(0), rows.size(0), grad.size(1)};
}

}  // namespace mor
