// Kernels of packed_linear, one set for each instruction set.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd/isa.h"
#include "csrc/ops/packed_linear.h"

namespace mor {

struct PackedLinear {
  PackedLinearDims dims;
  const float* x;  // [N, K], K padded with a zero to an even number if halves
  int64_t x_stride;
  const void* packed;
  const void* bias;  // null: none
  void* y;           // packed rows
  bool halves;       // packed, bias and y are bfloat16
};

// Outputs of panels [begin, end).
MOR_DECLARE_SIMD(void, packed_linear_panels, const PackedLinear& args, int64_t begin, int64_t end)

// Rows of bfloat16 [count] as floats.
MOR_DECLARE_SIMD(void, widen_row, const torch::headeronly::BFloat16* in, int64_t count, float* out)

}  // namespace mor
