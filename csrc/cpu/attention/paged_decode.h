// paged_depth_attention for few rows on many keys, as in decoding: head_dim lies in vector lanes, K
// and V are read where they are, each row once for all the query heads that share it. Included by
// paged_depth_attention.simd.cpp only.
#pragma once

#include "csrc/cpu/attention/paged_keys.h"

namespace mor {
namespace MOR_ISA {

// Into the second cache: of all prefetches the one that keeps most lines under way. A few at a
// time, between arithmetic: many at once would stand in the way of everything else.
inline void prefetch_far(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64)
    __builtin_prefetch(static_cast<const char*>(row) + b, 0, 2);
}

template <int kBit = kLanes / 2>
inline VecF largest_lane(VecF v) {
  VecI flipped;
  std::memcpy(&flipped, kLaneOrder<kBit, true>.index, sizeof flipped);
  for (int i = 0; i < kLanes; ++i) flipped[i] &= kLanes - 1;
  const VecF other = __builtin_shuffle(v, flipped);
  v = v > other ? v : other;
  if constexpr (kBit > 1) return largest_lane<kBit / 2>(v);
  else return v;
}

// scores[row][key], up to a multiple of kLanes keys; fetches rows far[key]. kVectors of a row, or
// 0: `vectors`.
template <int kRows, int kVectors, class E, class K>
void score_block(const E* q, const K* const* keys, const K* const* far, int64_t count,
                 int64_t vectors, float* scores) {
  if (kVectors != 0) vectors = kVectors;
  for (int64_t j = 0; j < count; j += kLanes) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      for (int i = r * kLanes / kRows; i < (r + 1) * kLanes / kRows; ++i)
        prefetch_far(far[j + i], vectors * kLanes * sizeof(K));
      const E* row = q + r * kRowStride<E>;
      VecF sum[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = VecF{};
      if constexpr (kVectors == 2 || kVectors == 4) {
        multiply_keys<kVectors>(row, keys + j, 0, sum);
      } else {
        int64_t n = 0;
        for (; n + 4 <= vectors; n += 4) multiply_keys<4>(row, keys + j, n * kLanes, sum);
        if (vectors & 2) multiply_keys<2>(row, keys + j, n * kLanes, sum), n += 2;
        if (vectors & 1) multiply_keys<1>(row, keys + j, n * kLanes, sum);
      }
      store(scores + r * kDirectKeys + j, reduce_each(sum));
    }
  }
}

// One row's scores [count] to weights, online; `largest` (in units of log2) and `sum` have
// kLanes equal and kLanes partial values. Returns the factor of the older sums.
template <class E>
inline float weigh_scores(float* scores, int64_t first, int64_t count, float scale,
                          const Visible& seen, float* largest, float* sum) {
  constexpr int kDegree = kPerElement<E> == 2 ? 4 : 6;
  const bool all = seen.first <= first && first + count <= seen.limit && count % kLanes == 0;
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  VecF most = splat(-kInfinity);
  for (int64_t j = 0; j < count; j += kLanes) {
    VecF x = load(scores + j) * splat(scale);
    if (!all) {
      const VecI key = lane + static_cast<int32_t>(first + j);
      const VecI last = VecI{} + static_cast<int32_t>(min(seen.limit, first + count));
      x = (key >= VecI{} + seen.first) & (key < last) ? x : splat(-kInfinity);
    }
    store(scores + j, x);
    most = x > most ? x : most;
  }
  const VecF before = load(largest);
  most = largest_lane(most);
  most = most > before ? most : before;
  const VecF base = most == splat(-kInfinity) ? VecF{} : most;
  const VecF factor = exp2_vec<6>(before - base);
  VecF total = load(sum) * factor;
  for (int64_t j = 0; j < count; j += kLanes) {
    const VecF weight = exp2_vec<kDegree>(load(scores + j) - base);
    store(scores + j, weight);
    total += weight;
  }
  store(largest, most);
  store(sum, total);
  return factor[0];
}

// Weights as the values' sums take them: floats, or (E uint32_t) pairs of bfloat16 of two keys.
template <class E>
inline void round_weights(float*, int64_t) {}

// out[row][offset ...] = out * factor[row] + sum over keys of weights[row][key] * value; kCount
// vectors of head_dim. Fetches rows far[key].
template <class E, int kRows, int kCount, class V>
void weigh_block(const float* weights, const float* factor, const V* const* values,
                 const V* const* far, int64_t offset, int64_t count, int64_t padded, float* out) {
  VecF sum[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n)
      sum[r][n] = load(out + r * padded + offset + n * kLanes) * splat(factor[r]);
  }
  if constexpr (kPerElement<E> == 2) {
#if defined(__AVX512BF16__)
    // Two rows interleaved: the low and the high half of each 128 bits, so that the sums lie in the
    // order of turn_sums.
    const auto add = [&](int64_t j, const auto& low_row, const auto& high_row) {
      __m512i pairs[kCount];
#pragma GCC unroll 4
      for (int n = 0; n < kCount; n += 2) {
        const __m512i low = low_row(n), high = high_row(n);
        pairs[n] = _mm512_unpacklo_epi16(low, high);
        pairs[n + 1] = _mm512_unpackhi_epi16(low, high);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        int32_t weight;
        std::memcpy(&weight, reinterpret_cast<const BFloat16*>(weights + r * kDirectKeys) + j, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(weight);
#pragma GCC unroll 4
        for (int n = 0; n < kCount; ++n)
          sum[r][n] = _mm512_dpbf16_ps(sum[r][n], both, (__m512bh)pairs[n]);
      }
    };
    const auto row = [&](int64_t j) {
      return [at = values[j] + offset](int n) { return _mm512_loadu_si512(at + n * kLanes); };
    };
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      prefetch_far(far[j] + offset, kCount * kLanes * sizeof(V));
      prefetch_far(far[j + 1] + offset, kCount * kLanes * sizeof(V));
      add(j, row(j), row(j + 1));
    }
    if (j < count) add(j, row(j), [](int) { return _mm512_setzero_si512(); });
#endif
  } else {
    for (int64_t j = 0; j < count; ++j) {
      VecF value[kCount];
      prefetch_far(far[j] + offset, kCount * kLanes * sizeof(V));
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) value[n] = load(values[j] + offset + n * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kCount; ++n)
          sum[r][n] += splat(weights[r * kDirectKeys + j]) * value[n];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) store(out + r * padded + offset + n * kLanes, sum[r][n]);
  }
}

// The order of the sums of weigh_block back to that of head_dim.
template <class E>
inline void turn_sums(float*, int64_t) {}

#if defined(__AVX512BF16__)
template <>
inline void round_weights<uint32_t>(float* weights, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    BFloat16* to = reinterpret_cast<BFloat16*>(weights) + j;
    store(to, load(weights + j));  // never past what has been read
  }
}
template <>
inline void turn_sums<uint32_t>(float* sums, int64_t padded) {
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t d = 0; d < padded; d += 32) {
    const VecF low = load(sums + d), high = load(sums + d + 16);
    store(sums + d, _mm512_permutex2var_ps(low, first, high));
    store(sums + d + 16, _mm512_permutex2var_ps(low, second, high));
  }
}
#endif

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
  float* largest = arena.take<float>(all_rows * kLanes);
  float* sum = arena.take<float>(all_rows * kLanes);
  Visible* visible = arena.take<Visible>(rows);
  float* scores = arena.take<float>(kRowsAtOnce * kDirectKeys);
  T* copies = arena.take<T>(direct ? 0 : 2 * kDirectKeys * padded);
  if (!scratch) return arena.used;

  for (int64_t r = 0; r < all_rows; ++r) {
    AttentionTask head = at;
    head.kv_head += r / rows;
    const RowIndex from = row_index(p.queries, head, at.row_begin + r % rows);
    const T* q = p.queries.q.at<T>(from.query, from.head);
    copy_row(q, hd, padded, all_q + r * kRowStride<E>);
    store(largest + r * kLanes, splat(-kInfinity));
  }
  for (int64_t r = 0; r < rows; ++r) visible[r] = visible_to(p, at, r);
  std::memset(sum, 0, all_rows * kLanes * sizeof(float));
  std::memset(all_out, 0, all_rows * padded * sizeof(float));
  const float scale = static_cast<float>(p.queries.scale * 1.4426950408889634);
  const int64_t vectors = padded / kPerElement<E> / kLanes;

  // Block by block of keys, in each head by head, whose rows are neighbours. While a head of one
  // block is worked on, its share of the rows of the next is fetched, in the order of memory.
  const int64_t num_keys = task.key_end - task.key_begin;
  const auto count_at = [&](int64_t first) { return min(kDirectKeys, num_keys - first); };
  KeyOffsets offsets[2];
  KeyPointers<K, T> keys, far;
  if (num_keys > 0) find_offsets(p, at.sequence, task.key_begin, count_at(0), offsets[0]);
  for (int64_t first = 0; first < num_keys; first += kDirectKeys) {
    const KeyOffsets& here = offsets[first / kDirectKeys % 2];
    KeyOffsets& there = offsets[1 - first / kDirectKeys % 2];
    const int64_t next = first + kDirectKeys < num_keys ? first + kDirectKeys : first;
    if (next != first) find_offsets(p, at.sequence, task.key_begin + next, count_at(next), there);
    const int64_t count = count_at(first);
    for (int64_t h = 0; h < heads; ++h) {
      find_pointers(p, here, count, at.kv_head + h, keys);
      find_pointers(p, next != first ? there : here, count, at.kv_head + h, far);
      for (int64_t j = 0; !direct && j < round_up(count, kLanes); ++j) {
        T* copy = copies + j * 2 * padded;
        const T* k = pad_row(reinterpret_cast<const T*>(keys.k[j]), hd, padded, copy);
        keys.k[j] = reinterpret_cast<const K*>(k);
        keys.v[j] = pad_row(keys.v[j], hd, padded, copy + padded);
      }
      const auto some_rows = [&]<int kRows>(int64_t first_row) {
        const int64_t row = h * rows + first_row;
        const E* q = all_q + row * kRowStride<E>;
        if (vectors == 2) score_block<kRows, 2>(q, keys.k, far.k, count, vectors, scores);
        else if (vectors == 4) score_block<kRows, 4>(q, keys.k, far.k, count, vectors, scores);
        else score_block<kRows, 0>(q, keys.k, far.k, count, vectors, scores);
        float factor[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
          float* row_scores = scores + r * kDirectKeys;
          factor[r] = weigh_scores<E>(row_scores, task.key_begin + first, count, scale,
                                      visible[first_row + r], largest + (row + r) * kLanes,
                                      sum + (row + r) * kLanes);
          round_weights<E>(row_scores, count);
        }
        float* out = all_out + row * padded;
        constexpr int kLeast = kPerElement<E>;
        int64_t d = 0;
        for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
          weigh_block<E, kRows, 4>(scores, factor, keys.v, far.v, d, count, padded, out);
        for (; d < padded; d += kLeast * kLanes)
          weigh_block<E, kRows, kLeast>(scores, factor, keys.v, far.v, d, count, padded, out);
      };
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) some_rows.template operator()<4>(r);
      if (rows - r == 3) some_rows.template operator()<3>(r);
      if (rows - r == 2) some_rows.template operator()<2>(r);
      if (rows - r == 1) some_rows.template operator()<1>(r);
    }
  }
  for (int64_t r = 0; r < all_rows; ++r, part += part_stride(hd)) {
    turn_sums<E>(all_out + r * padded, padded);
    std::memcpy(part, all_out + r * padded, hd * sizeof(float));
    float* end = part + part_stride(hd) - 2;
    end[0] = largest[r * kLanes], end[1] = reduce_add(load(sum + r * kLanes));
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
