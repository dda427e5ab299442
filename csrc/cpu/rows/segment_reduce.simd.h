// Kernels of segment_reduce, one set for each instruction set.
#pragma once

#include "csrc/cpu/rows/row_sums.h"
#include "csrc/cpu/simd/isa.h"
#include "csrc/ops/segment_reduce.h"

namespace mor {

// Rows of out, and of what the backward reads and writes beside x and grad, are packed.
struct SegmentReduce {
  ScalarType dtype;  // of x and out
  Reduce reduce;
  int64_t width;
  const void* x;
  int64_t x_stride;
  RowScale weights;
  const RowEntries* entries;  // the rows of every segment
  void* out;
  void* totals;  // of the accumulation type; null unless reduce is kMean
  bool stream;   // write around the cache
};

struct SegmentAmaxBackward {
  ScalarType dtype;
  int64_t width;
  const void* grad;
  int64_t grad_stride;
  const void* x;
  int64_t x_stride;
  const void* out;
  int64_t out_stride;
  const RowEntries* entries;
  void* grad_x;
};

// Segments [begin, end), and in the backward the rows that belong to them.
MOR_DECLARE_SIMD(void, segment_reduce_rows, const SegmentReduce& args, int64_t begin, int64_t end)
MOR_DECLARE_SIMD(void, segment_amax_backward_rows, const SegmentAmaxBackward& args, int64_t begin,
                 int64_t end)

}  // namespace mor
