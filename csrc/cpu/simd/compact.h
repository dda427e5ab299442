// Ordered compaction for *.simd.cpp: 64 rows at a time become a bit mask, and the mask ascending
// row numbers.
#pragma once

#include "vec.h"

namespace mor {
namespace MOR_ISA {

constexpr int64_t kBlock = 64;

// The bits of the first `count` rows of a block.
inline uint64_t first_bits(int64_t count) {
  return count >= kBlock ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// The lowest `count` set bits of mask.
inline uint64_t lowest_set_bits(uint64_t mask, int64_t count) {
  uint64_t rest = mask;
  for (; count > 0 && rest; --count) rest &= rest - 1;
  return mask ^ rest;
}

// Writes base + i for every set bit i of mask, ascending; returns the end of what was written.
inline int64_t* write_rows(uint64_t mask, int64_t base, int64_t* out) {
#if defined(__AVX512F__)
  __m512i row =
      _mm512_add_epi64(_mm512_set1_epi64(base), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  for (; mask; mask >>= 8) {
    const auto lanes = static_cast<__mmask8>(mask);
    const int count = __builtin_popcount(lanes);
    // In a register, then a masked store: compressing into memory is microcoded on Zen 4.
    _mm512_mask_storeu_epi64(out, static_cast<__mmask8>((1u << count) - 1),
                             _mm512_maskz_compress_epi64(lanes, row));
    out += count;
    row = _mm512_add_epi64(row, _mm512_set1_epi64(8));
  }
#else
  for (; mask; mask &= mask - 1) *out++ = base + __builtin_ctzll(mask);
#endif
  return out;
}

// Bit i: lane i of a comparison's result holds.
inline uint64_t lane_bits(VecI mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#elif defined(__SSE2__)
  return __builtin_ia32_movmskps(reinterpret_cast<VecF>(mask));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint64_t>(mask[i] != 0) << i;
  return bits;
#endif
}

// Bit i: p[i] is true, for a block of bytes.
inline uint64_t true_bits(const uint8_t* p) {
#if defined(__AVX512BW__)
  const __m512i v = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(v, v);
#else
  uint64_t bits = 0;
  for (int i = 0; i < kBlock; i += 8) {
    uint64_t bytes;  // each 0 or 1; the product gathers the low bit of each in the top byte
    std::memcpy(&bytes, p + i, 8);
    bits |= (bytes * 0x0102040810204080u >> 56) << i;
  }
  return bits;
#endif
}

}  // namespace MOR_ISA
}  // namespace mor
