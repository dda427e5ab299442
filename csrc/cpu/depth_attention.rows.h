// Forward of depth_attention for few rows on many keys, as in decoding: head_dim lies in vector
// lanes, K and V are read where they are. Included by depth_attention.simd.cpp only.
#pragma once

#include "depth_attention.pack.h"

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

// Lane l of the result is the sum of the lanes of v[l]; destroys v.
inline VecF reduce_each(VecF (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int w = kLanes / 2; w > 0; w /= 2) {
    VecI straight, crossed;
    for (int lane = 0; lane < kLanes; ++lane) {
      straight[lane] = lane & w ? kLanes + lane : lane;
      crossed[lane] = lane & w ? kLanes + (lane ^ w) : lane ^ w;
    }
#pragma GCC unroll 8
    for (int i = 0; i < w; ++i) {
      v[i] =
          __builtin_shuffle(v[i], v[i + w], straight) + __builtin_shuffle(v[i], v[i + w], crossed);
    }
  }
  return v[0];
}

// partial[row][key][kLanes] (+)= products of kCount vectors of a row of q and of a key.
template <int kRows, int kCount, bool kFirst, class E, class K>
void multiply_keys(const E* q, const K* const* keys, int64_t offset, int64_t count,
                   float* partial) {
  for (int64_t j = 0; j < count; ++j) {
    const K* key = keys[j] + offset;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* to = partial + (r * kBlockKeys + j) * kLanes;
      VecF sum = kFirst ? VecF{} : load(to);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n)
        sum = multiply_add(sum, q + r * kRowStride<E> + offset + n * kLanes, key + n * kLanes);
      store(to, sum);
    }
  }
}

// scores[row][key], up to a multiple of kLanes keys, of `vectors` vectors.
template <int kRows, class E, class K>
void score_rows(const E* q, const K* const* keys, int64_t count, int64_t vectors, float* partial,
                float* scores) {
  int64_t n = 0;
  if (vectors >= 4) multiply_keys<kRows, 4, true>(q, keys, 0, count, partial), n = 4;
  else multiply_keys<kRows, 1, true>(q, keys, 0, count, partial), n = 1;
  for (; n + 4 <= vectors; n += 4)
    multiply_keys<kRows, 4, false>(q, keys, n * kLanes, count, partial);
  for (; n < vectors; ++n) multiply_keys<kRows, 1, false>(q, keys, n * kLanes, count, partial);
  for (int r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < count; j += kLanes) {
      VecF v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load(partial + (r * kBlockKeys + j + i) * kLanes);
      store(scores + r * kBlockKeys + j, reduce_each(v));
    }
  }
}

// out[row][offset ...] = out * factor[row] + sum over keys of weights[row][key] * value.
template <int kRows, int kCount, class V>
void weigh_values(const float* weights, const float* factor, const V* const* values, int64_t offset,
                  int64_t count, int64_t padded, float* out) {
  VecF sum[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n)
      sum[r][n] = load(out + r * padded + offset + n * kLanes) * splat(factor[r]);
  }
  for (int64_t j = 0; j < count; ++j) {
    VecF value[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) value[n] = load(values[j] + offset + n * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) sum[r][n] += splat(weights[r * kBlockKeys + j]) * value[n];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) store(out + r * padded + offset + n * kLanes, sum[r][n]);
  }
}

// One row's scores of a block to weights, online; returns the factor of its older sums.
inline float softmax_row(float* scores, const KeyBlock<float>& block, float scale, int32_t limit,
                         int32_t depth, float& largest, float& sum) {
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  VecF most = splat(-kInfinity);
  for (int64_t j = 0; j < block.count; j += kLanes) {
    VecF x = load(scores + j) * splat(scale);
    if (block.bias) x += load(block.bias + j);
    VecI visible = lane + static_cast<int32_t>(block.first + j) < limit;
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
  const int64_t rows = task.row_end - task.row_begin;
  // Whole vectors are read from the operands; else rows are copied, with zeros at their end.
  const bool direct = padded == hd;
  using K = typename KeyType<T, E>::Type;
  Arena arena{scratch};
  E* q = arena.take<E>(rows * kRowStride<E>);
  float* out = arena.take<float>(rows * padded);
  float* partial = arena.take<float>(kRowsAtOnce * kBlockKeys * kLanes);
  float* scores = arena.take<float>(kRowsAtOnce * kBlockKeys);
  T* copied_k = arena.take<T>(direct ? 0 : kBlockKeys * padded);
  T* copied_v = arena.take<T>(direct ? 0 : kBlockKeys * padded);
  float* bias = arena.take<float>(kBlockKeys);
  int32_t* key_depths = arena.take<int32_t>(kBlockKeys);
  const RowLimits limits{arena.take<int32_t>(round_up(rows, kWidth)),
                         arena.take<int32_t>(round_up(rows, kWidth))};
  float* largest = arena.take<float>(rows);
  float* sum = arena.take<float>(rows);
  const int64_t sequence_keys = p.cu_k[task.sequence + 1] - p.cu_k[task.sequence];
  int32_t* list = arena.take<int32_t>(p.q_depths ? sequence_keys : 0);
  if (!scratch) return arena.used;

  const KeyList keys = list_keys(p, task, list);
  fill_limits(p, task, keys, limits);
  for (int64_t r = 0; r < rows; ++r) {
    const RowIndex at = row_index(p, task, task.row_begin + r);
    copy_row(p.q.at<T>(at.query, at.head), hd, padded, q + r * kRowStride<E>);
    largest[r] = -kInfinity;
  }
  std::memset(sum, 0, rows * sizeof(float));
  std::memset(out, 0, rows * padded * sizeof(float));
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);
  const int64_t vectors = padded / kPerElement<E> / kLanes;

  KeyBlock<float> block{};
  if (p.key_bias) block.bias = bias;
  if (keys.mask_depths) block.depths = key_depths;
  for (; block.first < keys.count; block.first += kBlockKeys) {
    block.count = min(kBlockKeys, keys.count - block.first);
    const K* k[kBlockKeys];
    const T* v[kBlockKeys];
    for (int64_t j = 0; j < block.count; ++j) {
      const int64_t row = keys.row(block.first + j);
      const T *from_k = p.k.at<T>(row, task.kv_head), *from_v = p.v.at<T>(row, task.kv_head);
      if (!direct) {
        from_k = pad_row(from_k, hd, padded, copied_k + j * padded);
        from_v = pad_row(from_v, hd, padded, copied_v + j * padded);
      }
      k[j] = reinterpret_cast<const K*>(from_k);
      v[j] = from_v;
      if (block.bias) bias[j] = static_cast<const float*>(p.key_bias)[row] * kLog2e;
      if (block.depths) key_depths[j] = p.k_depths[row];
    }
    const auto some_rows = [&]<int kRows>(int64_t first) {
      score_rows<kRows>(q + first * kRowStride<E>, k, block.count, vectors, partial, scores);
      float factor[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        factor[r] = softmax_row(scores + r * kBlockKeys, block, scale, limits.limit[first + r],
                                limits.depth[first + r], largest[first + r], sum[first + r]);
      }
      int64_t d = 0;
      for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
        weigh_values<kRows, 4>(scores, factor, v, d, block.count, padded, out + first * padded);
      for (; d < padded; d += kLanes)
        weigh_values<kRows, 1>(scores, factor, v, d, block.count, padded, out + first * padded);
    };
    int64_t first = 0;
    for (; first + 4 <= rows; first += 4) some_rows.template operator()<4>(first);
    if (rows - first == 3) some_rows.template operator()<3>(first);
    if (rows - first == 2) some_rows.template operator()<2>(first);
    if (rows - first == 1) some_rows.template operator()<1>(first);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const RowIndex at = row_index(p, task, task.row_begin + r);
    float* row = out + r * padded;
    for (int64_t d = 0; d < hd; ++d) row[d] = sum[r] != 0 ? row[d] / sum[r] : 0;
    store_row(row, hd, static_cast<T*>(p.out_data) + (at.query * p.dims.num_heads + at.head) * hd);
    static_cast<float*>(p.lse)[at.head * p.dims.num_queries + at.query] =
        log_sum(largest[r], sum[r]);
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
