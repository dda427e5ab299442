// Packed operands of depth_attention's tiles. Included by depth_attention.simd.cpp only.
//
// A tile's rows (query, head) lie in vector lanes, query-major, kWidth lanes to a group. Elements
// E: simd/gemm.h.
#pragma once

#include "depth_attention.keys.h"
#include "simd/exp.h"
#include "simd/gemm.h"

namespace mor {
namespace MOR_ISA {

constexpr int kMaxHeadDim = 256;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f, kInfinity = __builtin_inff();

// Values of the reduction in one E.
template <class E>
constexpr int kPerElement = 1;
template <>
inline constexpr int kPerElement<uint32_t> = 2;
// Elements between packed rows: constant, and an odd number of cache lines. Reduced along the row
// (head_dim), or along the keys, one row of elements then holding kPerElement keys.
template <class E>
constexpr int kRowStride = kMaxHeadDim / kPerElement<E> + 16;
constexpr int kKeyStride = kMaxHeadDim + 16;

// softmax_lse of a row with its largest score in units of log2.
inline float log_sum(float largest, float sum) {
  return sum != 0 ? (largest + __builtin_log2f(sum)) * kLn2 : -kInfinity;
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
inline void store_row(const float* line, int64_t head_dim, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(line + d));
  for (; d < head_dim; ++d) to[d] = static_cast<T>(line[d]);
}

// For a reduction along the keys: the row of a key, or for pairs the interleaved rows of two keys
// (`next` null: zeros).
template <class T>
inline void copy_keys(const T* row, const T*, int64_t head_dim, int64_t padded, float* to) {
  copy_row(row, head_dim, padded, to);
}
#if defined(__AVX512BF16__)
inline __m512i load_u16(const void* p, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
}
inline void copy_keys(const BFloat16* row, const BFloat16* next, int64_t head_dim, int64_t padded,
                      uint32_t* to) {
  for (int64_t d = 0; d < padded; d += 16) {
    const __mmask16 mask = static_cast<__mmask16>(first_lanes(head_dim - d));
    __m512i pair = load_u16(row + d, mask);
    if (next) pair = _mm512_or_si512(pair, _mm512_slli_epi32(load_u16(next + d, mask), 16));
    _mm512_storeu_si512(to + d, pair);
  }
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
  alignas(64) E line[kMaxHeadDim];
  for (int64_t row = 0; row < round_up(rows, kWidth); ++row) {
    E* column = to + row / kWidth * depth * kWidth + row % kWidth;
    if (row < rows) {
      const RowIndex at = row_index(p, task, task.row_begin + row);
      copy_row(x.at<T>(at.query, at.head), p.dims.head_dim, padded, line);
    } else {
      std::memset(line, 0, depth * sizeof(E));
    }
    for (int64_t e = 0; e < depth; ++e) column[e * kWidth] = line[e];
  }
}

// A block of packed keys. Reduced along d: k_rows, v_rows; along the keys: k_keys, v_keys. Null:
// not needed, or none.
template <class E>
struct KeyBlock {
  int64_t first, count;  // in the task's list
  E *k_rows, *v_rows, *k_keys, *v_keys;
  float* bias;  // times log2(e)
  int32_t* depths;
};

template <class T, class E>
void pack_keys(const AttentionProblem& p, int64_t head, const KeyList& keys, int64_t padded,
               const KeyBlock<E>& block) {
  const int64_t hd = p.dims.head_dim;
  for (int64_t j = 0; j < block.count; ++j) {
    const int64_t row = keys.row(block.first + j);
    const T *k = p.k.at<T>(row, head), *v = p.v.at<T>(row, head);
    copy_row(k, hd, padded, block.k_rows + j * kRowStride<E>);
    if (block.v_rows) copy_row(v, hd, padded, block.v_rows + j * kRowStride<E>);
    if (j % kPerElement<E> == 0) {
      const bool pair = kPerElement<E> == 2 && j + 1 < block.count;
      const int64_t next = pair ? keys.row(block.first + j + 1) : 0, at = j / kPerElement<E>;
      if (block.k_keys && block.k_keys != block.k_rows) {
        copy_keys(k, pair ? p.k.at<T>(next, head) : nullptr, hd, padded,
                  block.k_keys + at * kKeyStride);
      }
      if (block.v_keys) {
        copy_keys(v, pair ? p.v.at<T>(next, head) : nullptr, hd, padded,
                  block.v_keys + at * kKeyStride);
      }
    }
    if (block.bias) block.bias[j] = static_cast<const float*>(p.key_bias)[row] * kLog2e;
    if (block.depths) block.depths[j] = p.k_depths[row];
  }
}

}  // namespace MOR_ISA
}  // namespace mor
