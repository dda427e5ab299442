// Forward of depth_attention for few rows on many keys, as in decoding: head_dim lies in vector
// lanes, K and V are read where they are. Included by depth_attention.simd.cpp only.
#pragma once

#include "csrc/cpu/attention/pack.h"

namespace mor {
namespace MOR_ISA {

constexpr int kRowsAtOnce = 4;

// What K is read as: pairs, or its own dtype.
template <class T, class E>
struct KeyType {
  using Type = T;
};
template <class T>
struct KeyType<T, uint32_t> {
  using Type = uint32_t;
};

template <class T>
const T* pad_row(const T* row, int64_t head_dim, int64_t padded, T* to) {
  std::memcpy(static_cast<void*>(to), row, head_dim * sizeof(T));
  std::memset(static_cast<void*>(to + head_dim), 0, (padded - head_dim) * sizeof(T));
  return to;
}

// Index of lane `lane` of two joined vectors a and b: bit `bit` of the lane chooses the vector;
// `flip` takes the lane without or with that bit from it.
template <int kBit, bool kFlip>
struct LaneOrder {
  alignas(64) int32_t index[kLanes];
  constexpr LaneOrder() : index{} {
    for (int lane = 0; lane < kLanes; ++lane)
      index[lane] = (lane & kBit ? kLanes : 0) + (kFlip ? lane ^ kBit : lane);
  }
};
template <int kBit, bool kFlip>
inline constexpr LaneOrder<kBit, kFlip> kLaneOrder;

// Lane l of the result is the sum of the lanes of v[l]; destroys v.
template <int kBit = kLanes / 2>
inline VecF reduce_each(VecF (&v)[kLanes]) {
  VecI straight, flipped;
  std::memcpy(&straight, kLaneOrder<kBit, false>.index, sizeof straight);
  std::memcpy(&flipped, kLaneOrder<kBit, true>.index, sizeof flipped);
#pragma GCC unroll 8
  for (int i = 0; i < kBit; ++i) {
    v[i] = __builtin_shuffle(v[i], v[i + kBit], straight) +
           __builtin_shuffle(v[i], v[i + kBit], flipped);
  }
  if constexpr (kBit > 1) return reduce_each<kBit / 2>(v);
  else return v[0];
}

// Where the rows of a block of keys are; up to a multiple of kLanes, repeating the last.
template <class K, class V>
struct KeyPointers {
  const K* k[kBlockKeys];
  const V* v[kBlockKeys];
};

// sum[i] += products of kCount vectors of the row q and of key i.
template <int kCount, class E, class K>
inline void multiply_keys(const E* q, const K* const* keys, int64_t offset, VecF (&sum)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n)
      sum[i] = multiply_add(sum[i], q + offset + n * kLanes, keys[i] + offset + n * kLanes);
  }
}

// scores[row][key], up to a multiple of kLanes keys, of `vectors` vectors.
template <int kRows, class E, class K, class V>
void score_rows(const E* q, const KeyPointers<K, V>& keys, const KeyPointers<K, V>& next,
                int64_t count, int64_t vectors, float* scores) {
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int i = 0; i < kLanes; ++i) prefetch_row(next.k[j + i], vectors * kLanes * sizeof(K));
    for (int r = 0; r < kRows; ++r) {
      const E* row = q + r * kRowStride<E>;
      VecF sum[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = VecF{};
      int64_t n = 0;
      for (; n + 4 <= vectors; n += 4) multiply_keys<4>(row, keys.k + j, n * kLanes, sum);
      if (vectors & 2) multiply_keys<2>(row, keys.k + j, n * kLanes, sum), n += 2;
      if (vectors & 1) multiply_keys<1>(row, keys.k + j, n * kLanes, sum);
      store(scores + r * kDirectKeys + j, reduce_each(sum));
    }
  }
}

// out[row][offset ...] = out * factor[row] + sum over keys of weights[row][key] * value.
template <int kRows, int kCount, class V>
void weigh_values(const float* weights, const float* factor, const V* const* values,
                  const V* const* next, int64_t offset, int64_t count, int64_t padded, float* out) {
  VecF sum[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n)
      sum[r][n] = load(out + r * padded + offset + n * kLanes) * splat(factor[r]);
  }
  for (int64_t j = 0; j < count; ++j) {
    VecF value[kCount];
    prefetch_row(next[j] + offset, kCount * kLanes * sizeof(V));
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) value[n] = load(values[j] + offset + n * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) sum[r][n] += splat(weights[r * kDirectKeys + j]) * value[n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) store(out + r * padded + offset + n * kLanes, sum[r][n]);
  }
}

// One row's scores of a block to weights, online; returns the factor of its older sums.
inline float softmax_row(float* scores, const KeyBlock<float>& block, float scale, int32_t first,
                         int32_t limit, int32_t depth, float& largest, float& sum) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  VecF most = splat(-kInfinity);
  for (int64_t j = 0; j < block.count; j += kLanes) {
    VecF x = load(scores + j) * splat(scale);
    if (block.bias) x += load(block.bias + j);
    VecI visible = lane + static_cast<int32_t>(block.first + j) < limit;
    visible &= lane + static_cast<int32_t>(block.first + j) >= first;
    visible &= lane + static_cast<int32_t>(j) < static_cast<int32_t>(block.count);
    if (block.depths) {
      VecI depths;
      std::memcpy(&depths, block.depths + j, sizeof depths);
      visible &= depths >= depth;
    }
    x = visible ? x : splat(-kInfinity);
    store(scores + j, x);
    most = x > most ? x : most;
  }
  const float before = largest;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const VecF base = splat(largest == -kInfinity ? 0.0f : largest);
  VecF total{};
  for (int64_t j = 0; j < block.count; j += kLanes) {
    const VecF weight = exp2_vec<6>(load(scores + j) - base);
    store(scores + j, weight);
    total += weight;
  }
  const float factor = exp2_vec<6>(splat(before) - base)[0];
  sum = sum * factor + reduce_add(total);
  return factor;
}

template <class T, class E>
int64_t forward_rows(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  const int64_t hd = p.dims.head_dim, unit = 16 * kPerElement<E>, padded = round_up(hd, unit);
  const int64_t rows = task.row_end - task.row_begin, all_rows = rows * task.kv_heads;
  // Whole vectors are read from the operands; else rows are copied, with zeros at their end.
  const bool direct = padded == hd;
  using K = typename KeyType<T, E>::Type;
  Arena arena{scratch};
  E* all_q = arena.take<E>(all_rows * kRowStride<E>);
  float* all_out = arena.take<float>(all_rows * padded);
  float* largest = arena.take<float>(all_rows);
  float* sum = arena.take<float>(all_rows);
  float* scores = arena.take<float>(kRowsAtOnce * kDirectKeys);
  T* copies = arena.take<T>(direct ? 0 : 4 * kDirectKeys * padded);  // two blocks of K and V
  float* bias = arena.take<float>(kDirectKeys);
  int32_t* key_depths = arena.take<int32_t>(kDirectKeys);
  const RowLimits limits = take_limits(arena, p, round_up(rows, kWidth));
  const int64_t sequence_keys = p.cu_k[task.sequence + 1] - p.cu_k[task.sequence];
  int32_t* list = arena.take<int32_t>(p.q_depths ? sequence_keys : 0);
  if (!scratch) return arena.used;

  const KeyList keys = list_keys(p, task, list);
  fill_limits(p, task, keys, limits);
  const auto index = [&](int64_t row) {
    AttentionTask head = task;
    head.kv_head += row / rows;
    return row_index(p, head, task.row_begin + row % rows);
  };
  for (int64_t r = 0; r < all_rows; ++r) {
    const RowIndex at = index(r);
    copy_row(p.q.at<T>(at.query, at.head), hd, padded, all_q + r * kRowStride<E>);
    largest[r] = -kInfinity;
  }
  std::memset(sum, 0, all_rows * sizeof(float));
  std::memset(all_out, 0, all_rows * padded * sizeof(float));
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);
  const int64_t vectors = padded / kPerElement<E> / kLanes;

  // Steps: block by block, in each head by head, whose rows are neighbours. While one is worked on,
  // the next is fetched.
  const int64_t steps = round_up(keys.count, kDirectKeys) / kDirectKeys * task.kv_heads;
  KeyPointers<K, T> pointers[2];
  const auto find_keys = [&](int64_t step) {
    const int64_t first = step / task.kv_heads * kDirectKeys, side = step % 2;
    const int64_t head = task.kv_head + step % task.kv_heads;
    const int64_t count = min(kDirectKeys, keys.count - first);
    for (int64_t j = 0; j < round_up(count, kLanes); ++j) {
      const int64_t row = keys.row(first + min(j, count - 1));
      const T *k = p.k.at<T>(row, head), *v = p.v.at<T>(row, head);
      if (!direct) {
        T* copy = copies + (side * kDirectKeys + j) * 2 * padded;
        k = pad_row(k, hd, padded, copy), v = pad_row(v, hd, padded, copy + padded);
      }
      pointers[side].k[j] = reinterpret_cast<const K*>(k);
      pointers[side].v[j] = v;
    }
  };
  KeyBlock<float> block{};
  if (p.key_bias) block.bias = bias;
  if (keys.mask_depths) block.depths = key_depths;
  if (steps > 0) find_keys(0), pointers[1] = pointers[0];
  for (int64_t step = 0; step < steps; ++step) {
    block.first = step / task.kv_heads * kDirectKeys;
    block.count = min(kDirectKeys, keys.count - block.first);
    if (step + 1 < steps) find_keys(step + 1);  // after the last: rows already here
    const KeyPointers<K, T>&at = pointers[step % 2], &next = pointers[1 - step % 2];
    for (int64_t j = 0; (block.bias || block.depths) && j < block.count; ++j) {
      const int64_t row = keys.row(block.first + j);
      if (block.bias) bias[j] = static_cast<const float*>(p.key_bias)[row] * kLog2e;
      if (block.depths) key_depths[j] = p.k_depths[row];
    }
    const int64_t head_row = step % task.kv_heads * rows;
    const auto some_rows = [&]<int kRows>(int64_t first) {
      const int64_t row = head_row + first;
      score_rows<kRows>(all_q + row * kRowStride<E>, at, next, block.count, vectors, scores);
      float factor[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const RowLimits seen = limits.from(first + r);
        factor[r] =
            softmax_row(scores + r * kDirectKeys, block, scale, seen.first ? *seen.first : 0,
                        *seen.limit, *seen.depth, largest[row + r], sum[row + r]);
      }
      float* out = all_out + row * padded;
      int64_t d = 0;
      for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
        weigh_values<kRows, 4>(scores, factor, at.v, next.v, d, block.count, padded, out);
      for (; d < padded; d += kLanes)
        weigh_values<kRows, 1>(scores, factor, at.v, next.v, d, block.count, padded, out);
    };
    int64_t first = 0;
    for (; first + 4 <= rows; first += 4) some_rows.template operator()<4>(first);
    if (rows - first == 3) some_rows.template operator()<3>(first);
    if (rows - first == 2) some_rows.template operator()<2>(first);
    if (rows - first == 1) some_rows.template operator()<1>(first);
  }
  for (int64_t r = 0; r < all_rows; ++r) {
    const RowIndex at = index(r);
    float* row = all_out + r * padded;
    for (int64_t d = 0; d < hd; ++d) row[d] = sum[r] != 0 ? row[d] / sum[r] : 0;
    store_row(row, hd, static_cast<T*>(p.out_data) + (at.query * p.dims.num_heads + at.head) * hd);
    static_cast<float*>(p.lse)[at.head * p.dims.num_queries + at.query] =
        log_sum(largest[r], sum[r]);
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
