// Row kernel of gather_tokens, one for each instruction set.
#pragma once

#include <cstdint>

#include "csrc/checks.h"
#include "csrc/cpu/simd/isa.h"

namespace mor {

// Row i of out is row index[i] of in, for i < count; rows of `bytes`, `stride` bytes apart in `in`
// and packed in `out`. stream: write around the cache.
MOR_DECLARE_SIMD(void, copy_rows, const char* in, int64_t stride, const int64_t* index, char* out,
                 int64_t bytes, int64_t count, bool stream)

}  // namespace mor
