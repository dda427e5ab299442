// The steps of decode.h on one block of keys: scores, weights, sums of weighted values.
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
      store(scores + r * kDecodeKeys + j, reduce_each(sum));
    }
  }
}

// One row's scores of the keys first .. first + count - 1 to weights, online; `largest` (in units of
// log2) and `sum` have kLanes equal and kLanes partial values. Returns the factor of the older sums.
template <class E, class Keys>
inline float weigh_scores(float* scores, int64_t first, int64_t count, float scale,
                          const Keys& keys, const RowLimits& row, float* largest, float* sum) {
  constexpr int kDegree = kPerElement<E> == 2 ? 4 : 6;
  const int32_t first_seen = row.first ? *row.first : 0, limit = *row.limit;
  const bool plain = first_seen <= first && first + count <= limit && count % kLanes == 0 &&
                     !keys.bias && !keys.depths;
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  VecF most = splat(-kInfinity);
  for (int64_t j = 0; j < count; j += kLanes) {
    VecF x = load(scores + j) * splat(scale);
    if (!plain) {
      const VecI key = lane + static_cast<int32_t>(first + j);
      const VecI last = VecI{} + static_cast<int32_t>(min(limit, first + count));
      VecI visible = (key >= VecI{} + first_seen) & (key < last);
      if (keys.depths) {
        VecI depths;
        std::memcpy(&depths, keys.depths + j, sizeof depths);
        visible &= depths >= VecI{} + *row.depth;
      }
      if (keys.bias) x += load(keys.bias + j);
      x = visible ? x : splat(-kInfinity);
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
        std::memcpy(&weight, reinterpret_cast<const BFloat16*>(weights + r * kDecodeKeys) + j, 4);
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
          sum[r][n] += splat(weights[r * kDecodeKeys + j]) * value[n];
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

}  // namespace MOR_ISA
}  // namespace mor
