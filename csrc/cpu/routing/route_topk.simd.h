// route_topk of one sequence, one set of functions for each instruction set; route_threshold uses
// them too.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>

#include "csrc/cpu/simd/isa.h"

namespace mor {

struct RouteTopkSequence {
  const void* scores;             // of all rows, as the two masks
  const uint8_t* candidates;      // or null
  const uint8_t* protected_rows;  // or null
  int64_t begin, end;             // rows of the sequence
  int64_t k;                      // the best rows to choose, in 1 .. the rows that compete
  bool select;                    // look for the cut; false: it is known
  // Chosen are the rows that compete above the cut and the first `ties` of those equal to it.
  double cut;
  int64_t ties;
  int64_t num_rows;  // chosen and protected
  int64_t* rows;     // [num_rows]
  int64_t nan_row;   // result: the first row that competes with a NaN, or -1
};

constexpr double kNoCut = std::numeric_limits<double>::infinity();

// Chooses the k best of `available` rows; all or none of them need no search.
inline void route_topk_choose(RouteTopkSequence& sequence, int64_t k, int64_t available) {
  sequence.k = sequence.ties = k;
  sequence.select = k > 0 && k < available;
  sequence.cut = k == 0 ? kNoCut : -kNoCut;
}

// Bytes of scratch, aligned to 64, for sequences up to `length` rows.
inline int64_t route_topk_scratch(int64_t length) { return (length + 128) * 8; }

// nan_row, and the cut if select.
MOR_DECLARE_SIMD(void, route_topk_find, torch::headeronly::ScalarType dtype,
                 RouteTopkSequence& sequence, void* scratch)
MOR_DECLARE_SIMD(void, route_topk_write, torch::headeronly::ScalarType dtype,
                 const RouteTopkSequence& sequence)

}  // namespace mor
