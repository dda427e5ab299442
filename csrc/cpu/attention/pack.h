// Packed operands of attention's tiles. Included by the kernels of csrc/cpu/attention only.
//
// A tile's rows (query, head) lie in vector lanes, query-major, kWidth lanes to a group. Elements
// E: simd/gemm.h.
#pragma once

#include "csrc/cpu/attention/keys.h"
#include "csrc/cpu/simd/exp.h"
#include "csrc/cpu/simd/gemm.h"
#include "csrc/cpu/simd/transpose.h"

namespace mor {
namespace MOR_ISA {

constexpr int kMaxHeadDim = 256;
constexpr float kLn2 = 0.693147181f, kInfinity = __builtin_inff();

#if defined(__AVX512BF16__)
using BFloat16Element = uint32_t;
#else
using BFloat16Element = float;
#endif

// Calls body<T, E>() with the type of the operands and that of their packed elements; float64 has
// kernels of its own (float64.h).
template <class Body>
auto dispatch_elements(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body.template operator()<BFloat16, BFloat16Element>();
    case ScalarType::Half:
      return body.template operator()<Half, float>();
    default:
      return body.template operator()<float, float>();
  }
}

// Values of the reduction in one E.
template <class E>
constexpr int kPerElement = 1;
template <>
inline constexpr int kPerElement<uint32_t> = 2;
// Elements between packed rows: constant, and an odd number of cache lines. Reduced along the row
// (head_dim), or along the rows, kPerElement of which then stand in one.
template <class E>
constexpr int kRowStride = kMaxHeadDim / kPerElement<E> + 16;
constexpr int kKeyStride = kMaxHeadDim + 16;
// Where element (d, keys) of a block's k_keys and v_keys is: d * kKeysRow + keys * kKeysDepth.
// Pairs of keys are neighbours, as a tile of AMX wants them; that costs a transposition.
template <class E>
constexpr int kKeysRow = 1;
template <class E>
constexpr int kKeysDepth = kKeyStride;
template <>
inline constexpr int kKeysRow<uint32_t> = kBlockKeys / 2 + 16;
template <>
inline constexpr int kKeysDepth<uint32_t> = 1;
template <class E>
constexpr int64_t kKeysElements =
    kPerElement<E> == 1 ? kBlockKeys * kKeyStride : kMaxHeadDim * kKeysRow<E>;

// softmax_lse of a row from the score, in units of log2, whose weight is 1 in the sum.
inline float log_sum(float base, float sum) {
  return sum != 0 ? (base + __builtin_log2f(sum)) * kLn2 : -kInfinity;
}

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

// Floats from a row, zeros up to the padded width.
template <class T>
inline void copy_row(const T* row, int64_t head_dim, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(row + d));
  for (; d < head_dim; ++d) to[d] = static_cast<float>(row[d]);
  for (; d < padded; ++d) to[d] = 0;
}
#if defined(__AVX512BF16__)
// Bits of the lanes below `count`.
inline uint32_t first_lanes(int64_t count) {
  return count >= 32 ? 0xffffffffu : count > 0 ? (1u << count) - 1 : 0;
}
inline void copy_row(const BFloat16* row, int64_t head_dim, int64_t padded, uint32_t* to) {
  for (int64_t d = 0; d < padded; d += 32) {
    const __m512i pairs = _mm512_maskz_loadu_epi16(first_lanes(head_dim - d), row + d);
    _mm512_mask_storeu_epi32(to + d / 2, padded - d >= 32 ? 0xffff : 0xff, pairs);
  }
}
#endif
template <class T>
inline void store_row(const float* line, int64_t head_dim, T* to, float scale = 1) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(line + d) * splat(scale));
  for (; d < head_dim; ++d) to[d] = static_cast<T>(line[d] * scale);
}

// For a reduction along the rows: a row, or for pairs the interleaved rows of two (`next` null:
// zeros).
template <class T>
inline void copy_rows(const T* row, const T*, int64_t head_dim, int64_t padded, float* to) {
  copy_row(row, head_dim, padded, to);
}
#if defined(__AVX512BF16__)
inline __m512i load_u16(const void* p, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
}
// Elements d ... of two rows side by side, of one (`next` null: with zeros), of none (both null).
inline __m512i interleave(const BFloat16* row, const BFloat16* next, int64_t d, int64_t head_dim) {
  const __mmask16 mask = static_cast<__mmask16>(first_lanes(head_dim - d));
  if (!row) return __m512i{};
  const __m512i low = load_u16(row + d, mask);
  return next ? _mm512_or_si512(low, _mm512_slli_epi32(load_u16(next + d, mask), 16)) : low;
}
inline void copy_rows(const BFloat16* row, const BFloat16* next, int64_t head_dim, int64_t padded,
                      uint32_t* to) {
  for (int64_t d = 0; d < padded; d += 16)
    _mm512_storeu_si512(to + d, interleave(row, next, d, head_dim));
}
// The two bfloat16 roundings of each lane, a in the low half.
inline __m512i round_pairs(VecF a, VecF b) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}
#endif

// The task's rows of an operand into lanes: to[group][e][lane], zeros beyond the last row.
template <class T, class E>
void pack_lanes(const AttentionOperand& x, const AttentionProblem& p, const AttentionTask& task,
                int64_t padded, E* to) {
  const int64_t depth = padded / kPerElement<E>, rows = task.row_end - task.row_begin;
  alignas(64) E lines[kLanes * kRowStride<E>];
  const auto row = [&](int64_t lane) {
    const RowIndex at = row_index(p, task, task.row_begin + lane);
    return x.at<T>(at.query, at.head);
  };
  for (int64_t first = 0; first < round_up(rows, kWidth); first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      E* line = lines + i * kRowStride<E>;
      // The rows of a key head are not one stream, which the hardware would prefetch.
      if (first + kLanes + i < rows)
        prefetch_row(row(first + kLanes + i), p.dims.head_dim * sizeof(T));
      if (first + i < rows) {
        copy_row(row(first + i), p.dims.head_dim, padded, line);
      } else {
        std::memset(line, 0, depth * sizeof(E));
      }
    }
    E* columns = to + first / kWidth * depth * kWidth + first % kWidth;
    for (int64_t e = 0; e < depth; e += kLanes)
      transpose(lines + e, kRowStride<E>, columns + e * kWidth, kWidth, depth - e);
  }
}

// The lanes of a group, [d][kWidth], back to rows: calls write(lane, row) for each lane below
// `count`; a row is of `padded` floats, and write's to change.
template <class Write>
void unpack_lanes(const float* group, int64_t count, int64_t padded, Write&& write) {
  alignas(64) float lines[kLanes * kRowStride<float>];
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t d = 0; d < padded; d += kLanes)
      transpose(group + d * kWidth + first, kWidth, lines + d, kRowStride<float>, kLanes);
    for (int64_t i = 0; i < min(kLanes, count - first); ++i)
      write(first + i, lines + i * kRowStride<float>);
  }
}

// A block of packed keys. Reduced along d: k_rows, v_rows; along the keys: k_keys, v_keys. Null:
// not needed, or none.
template <class E>
struct KeyBlock {
  int64_t first, count;  // by the numbers of their source
  E *k_rows, *v_rows, *k_keys, *v_keys;
  const float* bias;  // times log2(e)
  const int32_t* depths;
};

// Rows of a block's keys for a reduction along the keys.
template <class T>
void pack_along_keys(const T* const* rows, int64_t count, int64_t head_dim, int64_t padded,
                     float* to) {
  for (int64_t j = 0; j < count; ++j)
    copy_row(rows[j], head_dim, padded, to + j * kKeysDepth<float>);
}
#if defined(__AVX512BF16__)
inline void pack_along_keys(const BFloat16* const* rows, int64_t count, int64_t head_dim,
                            int64_t padded, uint32_t* to) {
  const auto row = [&](int64_t j) { return j < count ? rows[j] : nullptr; };
  for (int64_t j = 0; j < count; j += 32) {
    for (int64_t d = 0; d < padded; d += 16) {
      VecI pairs[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        pairs[i] = (VecI)interleave(row(j + 2 * i), row(j + 2 * i + 1), d, head_dim);
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        std::memcpy(to + (d + i) * kKeysRow<uint32_t> + j / 2, &pairs[i], sizeof pairs[i]);
    }
  }
}
#endif

// Packs the keys `first` .. `first + count - 1` that the block names.
template <class T, class E, class Keys>
void pack_keys(Keys& keys, int64_t head, int64_t head_dim, int64_t padded, KeyBlock<E>& block) {
  KeyOffsets offsets;
  KeyPointers<T, T> rows;
  keys.find_offsets(block.first, block.count, offsets);
  find_pointers(keys, offsets, block.count, head, rows);
  keys.fill_block(block.first, block.count);
  block.bias = keys.bias, block.depths = keys.depths;
  for (int64_t j = 0; j < block.count; ++j) {
    copy_row(rows.k[j], head_dim, padded, block.k_rows + j * kRowStride<E>);
    if (block.v_rows) copy_row(rows.v[j], head_dim, padded, block.v_rows + j * kRowStride<E>);
  }
  if (block.k_keys && block.k_keys != block.k_rows)
    pack_along_keys(rows.k, block.count, head_dim, padded, block.k_keys);
  if (block.v_keys) pack_along_keys(rows.v, block.count, head_dim, padded, block.v_keys);
}

}  // namespace MOR_ISA
}  // namespace mor
