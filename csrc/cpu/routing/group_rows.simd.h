// group_rows of one chunk of rows, for few keys, one set of functions for each instruction set.
#pragma once

#include <cstdint>

#include "csrc/cpu/simd/isa.h"

namespace mor {

// Of num_rows keys: counts[key] += the rows with that key, and codes[i] = the key as a byte. A key
// out of range is not counted. key_bytes: 8 (int64), 4 (int32) or 1 (bool).
MOR_DECLARE_SIMD(void, group_rows_count, const void* keys, int key_bytes, int64_t num_rows,
                 int64_t num_keys, int64_t* counts, uint8_t* codes)

// rows[next[code]++] = row for codes[row], row = first .. last - 1.
MOR_DECLARE_SIMD(void, group_rows_write, const uint8_t* codes, int64_t first, int64_t last,
                 int64_t num_keys, int64_t* next, int64_t* rows)

}  // namespace mor
