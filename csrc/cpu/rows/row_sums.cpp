#include "csrc/cpu/rows/row_sums.h"

#include <cstdint>
#include <vector>

#include "csrc/cpu/rows/row_sums.simd.h"

namespace mor {
namespace {

RowOrder scan(const int64_t* rows, int64_t count, int64_t num_rows, const char* op,
              const char* name) {
  const RowOrder order = MOR_BEST(scan_rows)(rows, count, num_rows);
  if (!order.in_range) {
    int64_t i = 0;
    while (rows[i] >= 0 && rows[i] < num_rows) ++i;
    MOR_CHECK(false, op, ": expected ", name, " in [0, ", num_rows, "), got ", name, "[", i,
              "] = ", rows[i]);
  }
  return order;
}

}  // namespace

void check_row_range(const int64_t* rows, int64_t count, int64_t num_rows, const char* op,
                     const char* name) {
  scan(rows, count, num_rows, op, name);
}

RowEntries sort_entries(const int64_t* rows, int64_t count, int64_t num_rows, const char* op,
                        const char* name) {
  if (!scan(rows, count, num_rows, op, name).descends) return {rows, nullptr, count, nullptr};
  std::vector<int64_t> next(num_rows + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++next[rows[i] + 1];
  for (int64_t n = 0; n < num_rows; ++n) next[n + 1] += next[n];
  std::unique_ptr<int64_t[]> memory(new int64_t[2 * count]);
  int64_t *sorted = memory.get(), *order = sorted + count;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t j = next[rows[i]]++;
    sorted[j] = rows[i];
    order[j] = i;
  }
  return {sorted, order, count, std::move(memory)};
}

}  // namespace mor
