// What the CPU kernels of gather_tokens and scatter_tokens share: a scale for each row, and the
// sorted index of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>

#include "csrc/cpu/tuning.h"
#include "csrc/rows.h"

namespace mor {

// One factor for each row, of either dtype; absent, the factor is 1.
struct RowScale {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride = 1;
};

inline RowScale row_scale(const std::optional<Tensor>& t) {
  return t.has_value() ? RowScale{t->const_data_ptr(), t->scalar_type(), t->stride(0)} : RowScale{};
}

// An index of rows, sorted: entry j, in ascending order of (row, i), is update order[j] on row
// rows[j].
struct RowEntries {
  const int64_t* rows;
  const int64_t* order;  // null: the identity, the caller's rows are non-decreasing
  int64_t count;
  std::unique_ptr<int64_t[]> memory;
};

// Checks rows [count] against [0, num_rows), naming the first one outside; `name` is what the
// operator calls them.
void check_row_range(const int64_t* rows, int64_t count, int64_t num_rows, const char* op,
                     const char* name = "rows");

// Checks the range and sorts the entries: nothing to do if rows are non-decreasing, else a stable
// counting sort, O(count + num_rows).
RowEntries sort_entries(const int64_t* rows, int64_t count, int64_t num_rows, const char* op,
                        const char* name = "rows");

// Non-temporal stores want whole aligned lines.
inline bool streams(const void* out, int64_t num_rows, int64_t row_bytes) {
  return num_rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// Rows of `bytes` for one task.
inline int64_t rows_per_task(int64_t bytes) {
  return std::max<int64_t>(kBytesPerThread / std::max<int64_t>(bytes, 1), 1);
}

}  // namespace mor
