// route_topk of one sequence, one function for each instruction set.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "simd/isa.h"

namespace mor {

struct RouteTopkSequence {
  const void* scores;             // of all rows, as the two masks
  const uint8_t* candidates;      // or null
  const uint8_t* protected_rows;  // or null
  int64_t begin, end;             // rows of the sequence
  int64_t k;                      // in 0 .. available
  int64_t available;              // rows that compete
  int64_t num_rows;               // k + protected rows
  int64_t* rows;                  // [num_rows]
  int64_t nan_row;                // result: the first row that competes with a NaN, or -1
};

// Bytes of scratch, aligned to 64, for sequences up to `length` rows.
inline int64_t route_topk_scratch(int64_t length) { return (length + 128) * 8; }

// Writes the rows, or nothing but nan_row.
MOR_DECLARE_SIMD(void, route_topk_sequence, torch::headeronly::ScalarType dtype,
                 RouteTopkSequence& sequence, void* scratch)

}  // namespace mor
