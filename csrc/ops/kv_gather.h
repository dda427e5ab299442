// kv_gather: the rows of some entries of a paged cache, packed one entry after the other.
//   k_cache, v_cache  [num_blocks, block_size, Hkv, head_dim], as in kv_append.h
//   block_table       [B, max_blocks] int32: block j of entry b holds its rows j * block_size up
//                     to (j + 1) * block_size - 1; blocks past its length are not looked at
//   seq_lens          [B] int32: how many rows of each entry
//   num_rows          sum of seq_lens, given by the caller so that no device is waited for
//   k, v              [num_rows, Hkv, head_dim], contiguous
//   cu_seqlens        [B + 1] int32: entry b has the rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1
// An entry is one (sequence, recursion or layer) pair; entries may share blocks. Values are checked
// on the CPU: 0 <= seq_lens <= max_blocks * block_size, their sum, block numbers in
// [0, num_blocks). On CUDA a length is clamped into that range, rows past num_rows are left out
// and rows that no entry has are 0; a wrong block number is undefined. Not differentiable. MoR
// paper, section 2.2.2.
#pragma once

#include "kv_append.h"

namespace mor {

struct KvGatherDims {
  KvCacheDims cache;
  int64_t num_entries;  // B
  int64_t max_blocks;
  int64_t num_rows;
};

inline constexpr Operand kBlockTable{"block_table", "[B, max_blocks]", "int32"};
inline constexpr Operands kKvGatherOperands{
    "kv_gather",
    {kKCache, kVCache, kBlockTable, {"seq_lens", "[B]", "int32", "(the rows of block_table)"}}};

inline KvGatherDims check_kv_gather(const Tensor& k_cache, const Tensor& v_cache,
                                    const Tensor& block_table, const Tensor& seq_lens,
                                    int64_t num_rows) {
  const char* op = "kv_gather";
  kKvGatherOperands.check({&k_cache, &v_cache, &block_table, &seq_lens});
  const KvCacheDims cache = check_kv_cache(k_cache, v_cache, op);
  MOR_CHECK(num_rows >= 0 && num_rows <= INT32_MAX, op, ": expected num_rows in [0, 2^31), got ",
            num_rows);
  return {cache, block_table.size(0), block_table.size(1), num_rows};
}

// Blocks [first, end) of entry b, on the CPU; its row of block_table is `table`, contiguous.
inline void check_blocks(const int32_t* table, int64_t b, int64_t first, int64_t end,
                         int64_t num_blocks, const char* op) {
  for (int64_t j = first; j < end; ++j) {
    MOR_CHECK(table[j] >= 0 && table[j] < num_blocks, op, ": expected block_table in [0, ",
              num_blocks, "), got block_table[", b, ", ", j, "] = ", table[j]);
  }
}

}  // namespace mor
