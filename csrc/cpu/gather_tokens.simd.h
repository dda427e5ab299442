// Row kernels of gather_tokens, one set for each instruction set.
#pragma once

#include <cstdint>

#include "../checks.h"
#include "simd/isa.h"

namespace mor {

// sum[d] += x[d] for d < width.
MOR_DECLARE_SIMD(void, add_row_f32, float* sum, const float* x, int64_t width)

}  // namespace mor
