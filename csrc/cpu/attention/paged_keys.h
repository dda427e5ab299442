// The keys of a task of paged_depth_attention, as keys.h describes a source of keys. Included by
// paged_depth_attention.simd.cpp only.
#pragma once

#include "csrc/cpu/attention/keys.h"
#include "csrc/cpu/attention/paged_depth_attention.simd.h"

namespace mor {
namespace MOR_ISA {

// Numbered from the first of the entry.
struct PagedKeys {
  static constexpr const float* bias = nullptr;
  static constexpr const int32_t* depths = nullptr;
  const PagedProblem& p;
  const PagedTask& task;
  RowLimits limits;
  int64_t begin, end;

  PagedKeys(const PagedProblem& problem, const PagedTask& paged_task, Arena& arena)
      : p(problem), task(paged_task), begin(task.key_begin), end(task.key_end) {
    const AttentionTask& at = task.rows;
    const int64_t rows = at.row_end - at.row_begin, lanes = round_up(rows, kWidth);
    limits = take_limits(arena, p.context_starts, lanes);
    for (int64_t lane = 0; arena.base && lane < lanes; ++lane) {
      const int64_t row = at.row_begin + min(lane, rows - 1);
      const int64_t query = row_index(p.queries, at, row).query;
      if (limits.first) limits.first[lane] = p.context_starts[query];
      limits.limit[lane] = p.context_lens[query];
      limits.depth[lane] = 0;
    }
  }

  const PagedCache& k() const { return p.k; }
  const PagedCache& v() const { return p.v; }

  void find_offsets(int64_t first, int64_t count, KeyOffsets& offsets) const {
    const int64_t size = p.block_size;
    const int32_t* table = p.block_table + task.rows.sequence * p.max_blocks + first / size;
    for (int64_t j = 0, in_block = first % size; j < count; in_block = 0, ++table) {
      const int64_t block = *table, end = min(count, j + size - in_block);
      const int64_t k = block * p.k.block_stride + (in_block - j) * p.k.row_stride;
      const int64_t v = block * p.v.block_stride + (in_block - j) * p.v.row_stride;
      for (; j < end; ++j) {
        offsets.k[j] = k + j * p.k.row_stride;
        offsets.v[j] = v + j * p.v.row_stride;
      }
    }
    offsets.repeat_last(count);
  }

  void fill_block(int64_t, int64_t) const {}
};

}  // namespace MOR_ISA
}  // namespace mor
