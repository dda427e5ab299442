// paged_depth_attention for few rows on many keys, as in decoding: head_dim lies in vector lanes, K
// and V are read where they are, each row once for all the query heads that share it. Included by
// paged_depth_attention.simd.cpp only.
#pragma once

#include "paged_depth_attention.keys.h"

namespace mor {
namespace MOR_ISA {

template <class T, class E>
int64_t part_rows(const PagedProblem& p, const PagedTask& task, float* part, char* scratch) {
  const AttentionTask& at = task.rows;
  const int64_t hd = p.queries.dims.head_dim, padded = round_up(hd, 16 * kPerElement<E>);
  const int64_t heads = at.kv_heads, rows = at.row_end - at.row_begin, all_rows = rows * heads;
  // Whole vectors are read from the caches; else rows are copied, with zeros at their end.
  const bool direct = padded == hd;
  using K = typename KeyType<T, E>::Type;
  Arena arena{scratch};
  E* all_q = arena.take<E>(all_rows * kRowStride<E>);
  float* all_out = arena.take<float>(all_rows * padded);
  float* largest = arena.take<float>(all_rows);
  float* sum = arena.take<float>(all_rows);
  Visible* visible = arena.take<Visible>(rows);
  float* scores = arena.take<float>(kRowsAtOnce * kBlockKeys);
  T* copies = arena.take<T>(direct ? 0 : 4 * kBlockKeys * padded);  // two blocks of K and V
  if (!scratch) return arena.used;

  for (int64_t r = 0; r < all_rows; ++r) {
    AttentionTask head = at;
    head.kv_head += r / rows;
    const RowIndex from = row_index(p.queries, head, at.row_begin + r % rows);
    const T* q = p.queries.q.at<T>(from.query, from.head);
    copy_row(q, hd, padded, all_q + r * kRowStride<E>);
    largest[r] = -kInfinity;
  }
  for (int64_t r = 0; r < rows; ++r) visible[r] = visible_to(p, at, r);
  std::memset(sum, 0, all_rows * sizeof(float));
  std::memset(all_out, 0, all_rows * padded * sizeof(float));
  const float scale = static_cast<float>(p.queries.scale * 1.4426950408889634);
  const int64_t vectors = padded / kPerElement<E> / kLanes;

  // Steps: block by block, in each head by head, whose rows are neighbours. While one is worked on,
  // the next is fetched.
  const int64_t num_keys = task.key_end - task.key_begin;
  const int64_t steps = round_up(num_keys, kBlockKeys) / kBlockKeys * heads;
  KeyOffsets offsets;
  KeyPointers<K, T> pointers[2];
  const auto find_keys = [&](int64_t step) {
    const int64_t first = step / heads * kBlockKeys, side = step % 2;
    const int64_t count = min(kBlockKeys, num_keys - first);
    if (step % heads == 0) find_offsets(p, at.sequence, task.key_begin + first, count, offsets);
    KeyPointers<K, T>& keys = pointers[side];
    find_pointers(p, offsets, count, at.kv_head + step % heads, keys);
    for (int64_t j = 0; !direct && j < round_up(count, kLanes); ++j) {
      T* copy = copies + (side * kBlockKeys + j) * 2 * padded;
      const T* k = pad_row(reinterpret_cast<const T*>(keys.k[j]), hd, padded, copy);
      keys.k[j] = reinterpret_cast<const K*>(k);
      keys.v[j] = pad_row(keys.v[j], hd, padded, copy + padded);
    }
  };
  KeyBlock<float> block{};
  if (steps > 0) find_keys(0), pointers[1] = pointers[0];
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = step / heads * kBlockKeys, head_row = step % heads * rows;
    block.first = task.key_begin + first;
    block.count = min(kBlockKeys, num_keys - first);
    if (step + 1 < steps) find_keys(step + 1);  // after the last: rows already here
    const KeyPointers<K, T>&keys = pointers[step % 2], &next = pointers[1 - step % 2];
    const auto some_rows = [&]<int kRows>(int64_t first_row) {
      const int64_t row = head_row + first_row;
      score_rows<kRows>(all_q + row * kRowStride<E>, keys, next, block.count, vectors, scores);
      float factor[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const Visible seen = visible[first_row + r];
        factor[r] = softmax_row(scores + r * kBlockKeys, block, scale, seen.first, seen.limit, 0,
                                largest[row + r], sum[row + r]);
      }
      float* out = all_out + row * padded;
      int64_t d = 0;
      for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
        weigh_values<kRows, 4>(scores, factor, keys.v, next.v, d, block.count, padded, out);
      for (; d < padded; d += kLanes)
        weigh_values<kRows, 1>(scores, factor, keys.v, next.v, d, block.count, padded, out);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) some_rows.template operator()<4>(r);
    if (rows - r == 3) some_rows.template operator()<3>(r);
    if (rows - r == 2) some_rows.template operator()<2>(r);
    if (rows - r == 1) some_rows.template operator()<1>(r);
  }
  for (int64_t r = 0; r < all_rows; ++r, part += part_stride(hd)) {
    std::memcpy(part, all_out + r * padded, hd * sizeof(float));
    float* end = part + part_stride(hd) - 2;
    end[0] = largest[r], end[1] = sum[r];
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
