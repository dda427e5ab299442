// Ordered compaction for *.simd.cpp: 64 rows at a time become a bit mask, and the mask ascending
// row numbers.
#pragma once

#include "csrc/cpu/simd/vec.h"

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
  if (__builtin_popcountll(mask) > 20) {  // measured: below, bit by bit is faster
    __m512i row =
        _mm512_add_epi64(_mm512_set1_epi64(base), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    for (int i = 0; i < kBlock; i += 8) {
      const auto lanes = static_cast<__mmask8>(mask >> i);
      const int count = __builtin_popcount(lanes);
      // In a register, then a masked store: compressing into memory is microcoded on Zen 4.
      _mm512_mask_storeu_epi64(out, static_cast<__mmask8>((1u << count) - 1),
                               _mm512_maskz_compress_epi64(lanes, row));
      out += count;
      row = _mm512_add_epi64(row, _mm512_set1_epi64(8));
    }
    return out;
  }
#endif
  for (; mask; mask &= mask - 1) *out++ = base + __builtin_ctzll(mask);
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

// Bit i: p[i] == value, for a block of bytes.
inline uint64_t equal_bits(const uint8_t* p, uint8_t value) {
  uint64_t bits = 0;
#if defined(__AVX512BW__)
  bits = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(value)));
#elif defined(__AVX2__)
  for (int i = 0; i < kBlock; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    const __m256i equal = _mm256_cmpeq_epi8(v, _mm256_set1_epi8(static_cast<char>(value)));
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(equal))) << i;
  }
#elif defined(__SSE2__)
  typedef char Bytes __attribute__((vector_size(16)));
  const Bytes wanted = Bytes{} + static_cast<char>(value);
  for (int i = 0; i < kBlock; i += 16) {
    Bytes v;
    std::memcpy(&v, p + i, sizeof v);
    const auto equal = static_cast<uint16_t>(__builtin_ia32_pmovmskb128(v == wanted));
    bits |= static_cast<uint64_t>(equal) << i;
  }
#else
  for (int i = 0; i < kBlock; ++i) bits |= static_cast<uint64_t>(p[i] == value) << i;
#endif
  return bits;
}

// Bit i: p[i] is true, for a block of bytes.
inline uint64_t true_bits(const uint8_t* p) { return ~equal_bits(p, 0); }

}  // namespace MOR_ISA
}  // namespace mor
