// Attention of few rows to many keys, as in decoding: head_dim lies in vector lanes, K and V are
// read where they are, each row once for all the query heads that share it. Included by the kernels
// of csrc/cpu/attention only.
#pragma once

#include "csrc/cpu/attention/decode_steps.h"

namespace mor {
namespace MOR_ISA {

// Calls write(row, line, base, sum) for each row of the task, key head after key head: its sums of
// weighted values, which are write's to change, the score (in units of log2) whose weight is 1 in
// them, and the sum of weights. With no memory in the arena only counts.
template <class T, class E, class Keys, class Write>
void attend_rows(const AttentionProblem& p, const AttentionTask& task, Keys& keys, Arena& arena,
                 Write&& write) {
  const int64_t hd = p.dims.head_dim, padded = round_up(hd, 16 * kPerElement<E>);
  const int64_t heads = task.kv_heads, rows = task.row_end - task.row_begin;
  const int64_t all_rows = rows * heads;
  // Whole vectors are read from the operands; else rows are copied, with zeros at their end.
  const bool whole = padded == hd;
  using K = typename KeyType<T, E>::Type;
  E* all_q = arena.take<E>(all_rows * kRowStride<E>);
  float* all_out = arena.take<float>(all_rows * padded);
  float* largest = arena.take<float>(all_rows * kLanes);
  float* sum = arena.take<float>(all_rows * kLanes);
  float* scores = arena.take<float>(kRowsAtOnce * kDecodeKeys);
  T* copies = arena.take<T>(whole ? 0 : 2 * kDecodeKeys * padded);
  if (!arena.base) return;

  for (int64_t r = 0; r < all_rows; ++r) {
    AttentionTask head = task;
    head.kv_head += r / rows;
    const RowIndex from = row_index(p, head, task.row_begin + r % rows);
    copy_row(p.q.at<T>(from.query, from.head), hd, padded, all_q + r * kRowStride<E>);
    store(largest + r * kLanes, splat(-kInfinity));
  }
  std::memset(sum, 0, all_rows * kLanes * sizeof(float));
  std::memset(all_out, 0, all_rows * padded * sizeof(float));
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);
  const int64_t vectors = padded / kPerElement<E> / kLanes;

  // Block by block of keys, in each head by head, whose rows are neighbours. While a head of one
  // block is worked on, its share of the rows of the next is fetched, in the order of memory: one
  // block ahead.
  const auto count_at = [&](int64_t first) { return min(kDecodeKeys, keys.end - first); };
  KeyOffsets offsets[2];
  KeyOffsets *here = &offsets[0], *there = &offsets[1];
  KeyPointers<K, T> at, far;
  if (keys.begin < keys.end) keys.find_offsets(keys.begin, count_at(keys.begin), *there);
  for (int64_t first = keys.begin; first < keys.end; first += kDecodeKeys) {
    KeyOffsets* const fetched = there;
    there = here, here = fetched;
    const int64_t count = count_at(first), next = first + kDecodeKeys;
    const bool has_next = next < keys.end;  // after the last: rows that are here already
    if (has_next) keys.find_offsets(next, count_at(next), *there);
    keys.fill_block(first, count);
    for (int64_t h = 0; h < heads; ++h) {
      find_pointers(keys, *here, count, task.kv_head + h, at);
      find_pointers(keys, has_next ? *there : *here, count, task.kv_head + h, far);
      for (int64_t j = 0; !whole && j < round_up(count, kLanes); ++j) {
        T* copy = copies + j * 2 * padded;
        const T* k = pad_row(reinterpret_cast<const T*>(at.k[j]), hd, padded, copy);
        at.k[j] = reinterpret_cast<const K*>(k);
        at.v[j] = pad_row(at.v[j], hd, padded, copy + padded);
      }
      const auto some_rows = [&]<int kRows>(int64_t first_row) {
        const int64_t row = h * rows + first_row;
        const E* q = all_q + row * kRowStride<E>;
        if (vectors == 2) score_block<kRows, 2>(q, at.k, far.k, count, vectors, scores);
        else if (vectors == 4) score_block<kRows, 4>(q, at.k, far.k, count, vectors, scores);
        else score_block<kRows, 0>(q, at.k, far.k, count, vectors, scores);
        float factor[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
          float* row_scores = scores + r * kDecodeKeys;
          factor[r] = weigh_scores<E>(row_scores, first, count, scale, keys,
                                      keys.limits.from(first_row + r), largest + (row + r) * kLanes,
                                      sum + (row + r) * kLanes);
          round_weights<E>(row_scores, count);
        }
        float* out = all_out + row * padded;
        constexpr int kLeast = kPerElement<E>;
        int64_t d = 0;
        for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
          weigh_block<E, kRows, 4>(scores, factor, at.v, far.v, d, count, padded, out);
        for (; d < padded; d += kLeast * kLanes)
          weigh_block<E, kRows, kLeast>(scores, factor, at.v, far.v, d, count, padded, out);
      };
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) some_rows.template operator()<4>(r);
      if (rows - r == 3) some_rows.template operator()<3>(r);
      if (rows - r == 2) some_rows.template operator()<2>(r);
      if (rows - r == 1) some_rows.template operator()<1>(r);
    }
  }
  for (int64_t r = 0; r < all_rows; ++r) {
    float* line = all_out + r * padded;
    turn_sums<E>(line, padded);
    write(r, line, largest[r * kLanes], reduce_add(load(sum + r * kLanes)));
  }
}

}  // namespace MOR_ISA
}  // namespace mor
