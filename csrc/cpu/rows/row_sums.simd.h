// Kernels over rows and their entries, one set for each instruction set.
#pragma once

#include "csrc/cpu/rows/row_sums.h"
#include "csrc/cpu/simd/isa.h"

namespace mor {

struct RowOrder {
  bool in_range;  // every row in [0, num_rows)
  bool descends;  // some row is smaller than the one before
};

// out[n] = base_scale[n] * base[n] + sum of gate[order[j]] * updates[order[j]] over entries j on
// n.
struct RowSums {
  ScalarType dtype;  // of out, base and updates
  int64_t width;
  void* out;
  int64_t out_stride;
  const void* base;  // null: zeros; may be out
  int64_t base_stride;
  RowScale base_scale;
  const void* updates;
  int64_t updates_stride;
  RowScale gate;
  const RowEntries* entries;
  bool stream;  // write around the cache
};

MOR_DECLARE_SIMD(RowOrder, scan_rows, const int64_t* rows, int64_t count, int64_t num_rows)
// Every row n in [begin, end).
MOR_DECLARE_SIMD(void, sum_rows, const RowSums& sums, int64_t begin, int64_t end)
// Only the rows of entries [begin, end); a row belongs to the range that holds its first entry.
MOR_DECLARE_SIMD(void, sum_updated_rows, const RowSums& sums, int64_t begin, int64_t end)

}  // namespace mor
