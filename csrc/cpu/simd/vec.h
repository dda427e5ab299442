// A vector of floats as wide as the instruction set in force (MOR_ISA): 4, 8 or 16 lanes, by the
// compiler's vector extension, so the same kernel text serves every set. Included by *.simd.cpp
// only.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mor {
namespace MOR_ISA {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));

// Minus nothing and not plus: -0 + 0 is 0, so that a compiler would have to add.
inline VecF splat(float x) { return x - VecF{}; }

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }

inline VecF load(const BFloat16* p) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// The nearest bfloat16, ties to even, in the upper half of each lane; a NaN stays a NaN.
inline VecU bfloat16_bits(VecF v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU nearest = bits + 0x7fff + (bits >> 16 & 1);
  return v != v ? VecU{} + 0x7fc00000 : nearest;
}

inline void store(BFloat16* p, VecF v) {
#if defined(__AVX512BF16__)
  const __m256bh b = _mm512_cvtneps_pbh(v);
#else
  typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
  const Halves b = __builtin_convertvector(bfloat16_bits(v) >> 16, Halves);
#endif
  std::memcpy(p, &b, sizeof b);
}

// 2 * kLanes bfloat16 as floats, those at even places and those at odd ones: a shift and a mask
// widen them so, where in order each half is a permutation.
struct VecPair {
  VecF even, odd;
};

inline VecPair operator+(VecPair a, VecPair b) { return {a.even + b.even, a.odd + b.odd}; }
inline VecPair operator*(VecPair a, VecPair b) { return {a.even * b.even, a.odd * b.odd}; }
inline VecPair operator*(VecPair a, float b) { return {a.even * b, a.odd * b}; }
inline VecPair& operator+=(VecPair& a, VecPair b) { return a = a + b; }
inline VecPair& operator/=(VecPair& a, float b) { return a = {a.even / b, a.odd / b}; }

inline VecPair load_pair(const BFloat16* p) {
  VecU bits;
  std::memcpy(&bits, p, sizeof bits);
  return {reinterpret_cast<VecF>(bits << 16), reinterpret_cast<VecF>(bits & 0xffff0000)};
}

// Of values that are bfloat16 already; keeps subnormals, which the rounding of avx512_bf16 does
// not.
inline void store_exact(BFloat16* p, VecPair v) {
  const VecU bits = reinterpret_cast<VecU>(v.even) >> 16 | reinterpret_cast<VecU>(v.odd);
  std::memcpy(p, &bits, sizeof bits);
}

inline void store(BFloat16* p, VecPair v) {
#if defined(__AVX512BF16__)
  const __m512bh halves = _mm512_cvtne2ps_pbh(v.odd, v.even);
  typedef int16_t Places __attribute__((vector_size(64)));
  const Places in_turn = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i bits =
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(in_turn), (__m512i)halves);
  std::memcpy(p, &bits, sizeof bits);
#else
  const VecU bits = bfloat16_bits(v.even) >> 16 | (bfloat16_bits(v.odd) & 0xffff0000);
  std::memcpy(p, &bits, sizeof bits);
#endif
}

inline VecF load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}
inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

inline float reduce_add(VecF v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

}  // namespace MOR_ISA
}  // namespace mor
