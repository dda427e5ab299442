// [N, D] and [N, H, head_dim] operands as both devices read them.
#pragma once

#include "tensors.h"

namespace mor {

// A [N, D] operand with contiguous rows; stride in elements. Keeps its tensor alive.
struct Rows {
  Tensor tensor;
  const void* data;
  int64_t stride;
};

// Without a copy where rows are contiguous; one row where all rows are the same (a gradient from
// sum() has stride 0); else contiguous once.
inline Rows contiguous_rows(Tensor t) {
  if (t.size(1) <= 1 || t.stride(1) == 1) return {t, t.const_data_ptr(), t.stride(0)};
  const bool repeated = t.stride(0) == 0 && t.size(0) > 0;
  const Tensor copy = as_contiguous(repeated ? torch::stable::narrow(t, 0, 0, 1) : t);
  return {copy, copy.const_data_ptr(), repeated ? 0 : copy.stride(0)};
}

// A [N, H, head_dim] operand whose head rows are contiguous: itself, or a copy.
inline Tensor last_contiguous(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : as_contiguous(t);
}

}  // namespace mor
