// paged_depth_attention for many rows of an entry, as in prefill: the tiles of depth_attention's
// forward, of one key head, with keys packed from where the block table says. Included by
// paged_depth_attention.simd.cpp only.
#pragma once

#include "csrc/cpu/attention/paged_keys.h"

namespace mor {
namespace MOR_ISA {

template <class T, class E>
void pack_paged_keys(const KeyPointers<T, T>& keys, int64_t head_dim, int64_t padded,
                     const KeyBlock<E>& block) {
  for (int64_t j = 0; j < block.count; ++j)
    copy_row(keys.k[j], head_dim, padded, block.k_rows + j * kRowStride<E>);
  pack_along_keys(keys.v, block.count, head_dim, padded, block.v_keys);
}

// Rows from the lanes of a group.
inline void write_part(const RowSums& sums, const float* out, int64_t lanes, int64_t head_dim,
                       int64_t padded, float* parts) {
  unpack_lanes(out, lanes, padded, [&](int64_t lane, const float* line) {
    float* part = parts + lane * part_stride(head_dim);
    float* end = part + part_stride(head_dim) - 2;
    std::memcpy(part, line, head_dim * sizeof(float));
    end[0] = sums.base[lane], end[1] = sums.sum[lane];
  });
}

template <class T, class E>
int64_t part_tiles(const PagedProblem& p, const PagedTask& task, float* part, char* scratch) {
  const int64_t hd = p.queries.dims.head_dim;
  const int64_t padded = round_up(hd, 16), depth = padded / kPerElement<E>;
  const int64_t rows = task.rows.row_end - task.rows.row_begin;
  const int64_t lanes = round_up(rows, kWidth);
  Arena arena{scratch};
  E* q = arena.take<E>(lanes * depth);
  float* out = arena.take<float>(lanes * padded);
  const RowSums sums{arena.take<float>(lanes), arena.take<float>(lanes)};
  const RowLimits limits{p.context_starts ? arena.take<int32_t>(lanes) : nullptr,
                         arena.take<int32_t>(lanes), arena.take<int32_t>(lanes)};
  float* scores = arena.take<float>(kBlockKeys * kWidth);
  E* weights = arena.take<E>(kBlockKeys / kPerElement<E> * kWidth);
  float* factor = arena.take<float>(kWidth);
  KeyBlock<E> block{};
  block.k_rows = arena.take<E>(kBlockKeys * kRowStride<E>);
  block.v_keys = arena.take<E>(kKeysElements<E>);
  if (!scratch) return arena.used;

  pack_lanes<T>(p.queries.q, p.queries, task.rows, padded, q);
  for (int64_t row = 0; row < lanes; ++row) {
    const Visible seen = visible_to(p, task.rows, min(row, rows - 1));
    if (limits.first) limits.first[row] = seen.first;
    limits.limit[row] = seen.limit;
    limits.depth[row] = 0;
    sums.base[row] = -kInfinity;
  }
  std::memset(sums.sum, 0, lanes * sizeof(float));
  std::memset(out, 0, lanes * padded * sizeof(float));
  const Tiles tiles;
  const float log2_scale = static_cast<float>(p.queries.scale * 1.4426950408889634);
  KeyOffsets offsets;
  KeyPointers<T, T> pointers;

  for (block.first = task.key_begin; block.first < task.key_end; block.first += kBlockKeys) {
    block.count = min(kBlockKeys, task.key_end - block.first);
    const LaneRange seeing = lanes_that_see(limits, lanes, block.first, block.count);
    if (seeing.begin == seeing.end) continue;
    find_offsets(p, task.rows.sequence, block.first, block.count, offsets);
    find_pointers(p, offsets, block.count, task.rows.kv_head, pointers);
    pack_paged_keys(pointers, hd, padded, block);
    attend_block(block, limits, sums, seeing, padded, log2_scale, q, scores, weights, factor, out);
  }
  for (int64_t lane = 0; lane < rows; lane += kWidth) {
    write_part({sums.base + lane, sums.sum + lane}, out + lane * padded, min(kWidth, rows - lane),
               hd, padded, part + lane * part_stride(hd));
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
