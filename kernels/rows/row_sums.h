// Glue for row_sums.cuh, shared by gather_tokens.cu, scatter_tokens.cu and segment_reduce.cu.
#pragma once

#include <optional>

#include "../glue.h"
#include "row_sums.cuh"

namespace mor {

template <class T>
RowFactor<T> row_factor(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {nullptr, false, 0};
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Float, t->stride(0)};
}

// Room for the first and last update of every row; updates are counted in int.
inline Tensor range_scratch(const Tensor& rows, int64_t num_rows, const char* op) {
  MOR_CHECK(rows.size(0) <= INT32_MAX, op, ": expected fewer than 2^31 rows on CUDA, got ",
            shape_str(rows));
  return new_tensor(rows, {2 * num_rows}, ScalarType::Int);
}

}  // namespace mor
