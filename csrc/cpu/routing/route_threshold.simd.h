// What route_threshold adds to route_topk of one sequence, one set of functions for each
// instruction set.
#pragma once

#include "csrc/cpu/routing/route_topk.simd.h"

namespace mor {

// With s.cut given: num_rows and ties of the rows above it (inclusive: or equal to it); nan_row.
MOR_DECLARE_SIMD(void, route_threshold_count, torch::headeronly::ScalarType dtype,
                 RouteTopkSequence& s, bool inclusive)

// The fewest best rows with `mass` of the sum of all: num_rows, cut, ties and nan_row. Returns the
// first row whose weight is negative or infinite, or -1. Scratch: route_topk_scratch.
MOR_DECLARE_SIMD(int64_t, route_threshold_mass, torch::headeronly::ScalarType dtype,
                 RouteTopkSequence& s, double mass, void* scratch)

}  // namespace mor
