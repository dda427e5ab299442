// bipartite_match of some rows of one sequence, one set of functions for each instruction set.
#pragma once

#include "csrc/checks.h"
#include "csrc/cpu/simd/isa.h"

namespace mor {

struct BipartiteMatch {
  ScalarType dtype;
  int64_t width;
  bool cosine;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  void* scores;  // float or double
  int64_t* index;
};

// Rows of a against all rows of b of their sequence.
struct MatchTask {
  int64_t a_begin, a_end, b_begin, b_end;
};

// Rows of a that a task should have: enough to use a converted block of b often, few enough to stay
// in the second cache.
inline int64_t match_task_rows(int64_t width) {
  const int64_t rows = (int64_t{256} << 10) / (4 * (width > 0 ? width : 1));
  return rows >= 240 ? 240 : rows >= 96 ? rows / 48 * 48 : 48;
}

// Bytes of scratch, aligned to 64.
MOR_DECLARE_SIMD(int64_t, match_scratch, const BipartiteMatch& match, int64_t task_rows)
MOR_DECLARE_SIMD(void, match_rows, const BipartiteMatch& match, const MatchTask& task,
                 void* scratch)

}  // namespace mor
