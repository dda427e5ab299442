// Where the keys of a task of paged_depth_attention are. Included by
// paged_depth_attention.simd.cpp only.
#pragma once

#include "csrc/cpu/attention/decode.h"
#include "csrc/cpu/attention/paged_depth_attention.simd.h"
#include "csrc/cpu/attention/tiles.h"

namespace mor {
namespace MOR_ISA {

// Element offsets of a block of keys in each cache, of head 0; past its end, up to a multiple of
// kLanes and to kDirectKeys, those of the last key.
struct KeyOffsets {
  int64_t k[kBlockKeys], v[kBlockKeys];
};

inline void find_offsets(const PagedProblem& p, int64_t entry, int64_t first, int64_t count,
                         KeyOffsets& offsets) {
  const int32_t* table = p.block_table + entry * p.max_blocks + first / p.block_size;
  for (int64_t j = 0, in_block = first % p.block_size; j < count; in_block = 0, ++table) {
    const int64_t block = *table, end = min(count, j + p.block_size - in_block);
    const int64_t k = block * p.k.block_stride + (in_block - j) * p.k.row_stride;
    const int64_t v = block * p.v.block_stride + (in_block - j) * p.v.row_stride;
    for (; j < end; ++j) {
      offsets.k[j] = k + j * p.k.row_stride;
      offsets.v[j] = v + j * p.v.row_stride;
    }
  }
  for (int64_t j = count; j < max(kDirectKeys, round_up(count, kLanes)); ++j) {
    offsets.k[j] = offsets.k[count - 1];
    offsets.v[j] = offsets.v[count - 1];
  }
}

template <class K, class T>
void find_pointers(const PagedProblem& p, const KeyOffsets& offsets, int64_t count, int64_t head,
                   KeyPointers<K, T>& to) {
  const T* k = static_cast<const T*>(p.k.data) + head * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + head * p.v.head_stride;
  for (int64_t j = 0; j < round_up(count, kLanes); ++j) {
    to.k[j] = reinterpret_cast<const K*>(k + offsets.k[j]);
    to.v[j] = v + offsets.v[j];
  }
}

// The keys that row `row` of a task sees, counted from the first of the entry.
struct Visible {
  int32_t first, limit;
};
inline Visible visible_to(const PagedProblem& p, const AttentionTask& rows, int64_t row) {
  const int64_t query = row_index(p.queries, rows, rows.row_begin + row).query;
  return {p.context_starts ? p.context_starts[query] : 0, p.context_lens[query]};
}

}  // namespace MOR_ISA
}  // namespace mor
