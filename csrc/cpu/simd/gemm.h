// Small matrix products from packed operands, the inner loops of attention and matching: C = A B
// with C in float32. Included by *.simd.cpp only.
//
// An element E of A and B is a float, or (avx512_bf16) a uint32_t holding two bfloat16 that are
// neighbours along the reduction, multiplied and added by one vdpbf16ps, or on the tiles of AMX. A
// is read by broadcasts, so it may lie in either order (not on tiles); B and C have their columns
// in vector lanes.
#pragma once

#include <type_traits>

#include "csrc/cpu/simd/vec.h"
#if defined(__AMX_BF16__)
#include "csrc/cpu/simd/amx.h"
#endif

namespace mor {
namespace MOR_ISA {

constexpr int kTileRows = kLanes == 16 ? 8 : 4;  // AVX-512 has 32 registers, the others 16

inline VecF multiply_add(VecF sum, float a, const float* b) { return sum + splat(a) * load(b); }
template <class T>
inline VecF multiply_add(VecF sum, const float* a, const T* b) {
  return sum + load(a) * load(b);
}

#if defined(__AVX512BF16__)
inline __m512bh load_pairs(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline VecF multiply_add(VecF sum, uint32_t a, const uint32_t* b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), load_pairs(b));
}
// By hand: GCC 12 copies most of b through the stack on its way into the intrinsic.
inline VecF multiply_add(VecF sum, const uint32_t* a, const uint32_t* b) {
  asm("vdpbf16ps %2, %1, %0"
      : "+v"(sum)
      : "v"(_mm512_loadu_si512(a)), "m"(*reinterpret_cast<const uint32_t (*)[16]>(b)));
  return sum;
}
#endif

enum class Into { kOverwrite, kAdd, kScaleAndAdd };  // C = AB, C + AB, C * scale[column] + AB

// Longer sums are made of parts, whose rounding errors are smaller.
constexpr int64_t kLongestSum = 128;

// C [kTileRows, kVectors * kLanes]; element (m, r) of A at a[m * kRowA + r * kDepthA], row r of B
// at b + r * kRowB, row m of C at c + m * kRowC. Strides are constants: they become displacements.
template <class E, int kVectors, int kRowA, int kDepthA, int kRowB, int kRowC, Into kInto>
inline void multiply_tile(int64_t depth, const E* a, const E* b, float* c, const float* scale) {
  VecF sum[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      sum[m][n] = VecF{};
    }
  }
  for (int64_t r = 0; r < depth; ++r, a += kDepthA, b += kRowB) {
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n)
        sum[m][n] = multiply_add(sum[m][n], a[m * kRowA], b + n * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* to = c + m * kRowC + n * kLanes;
      if constexpr (kInto == Into::kAdd) sum[m][n] += load(to);
      if constexpr (kInto == Into::kScaleAndAdd) sum[m][n] += load(to) * load(scale + n * kLanes);
      store(to, sum[m][n]);
    }
  }
}

#if !defined(__AMX_BF16__)
struct Tiles {
  Tiles() {}  // not trivial, or it would be an unused variable
};
#endif

// Lengthens B [depth][columns] by zeros to what tiles of AMX take whole, where they are used;
// returns the new depth. What A has there must be finite.
inline int64_t lengthen(float*, int64_t depth, int64_t) { return depth; }
inline int64_t lengthen([[maybe_unused]] uint32_t* b, int64_t depth,
                        [[maybe_unused]] int64_t columns) {
#if defined(__AMX_BF16__)
  if (isa() == Isa::kAmxBf16) {
    const int64_t filled = depth;
    depth = (depth + kTile - 1) / kTile * kTile;
    std::memset(b + filled * columns, 0, (depth - filled) * columns * sizeof *b);
  }
#endif
  return depth;
}

// As multiply_tile for `rows` rows, rounded up to a multiple of kTileRows; where kDepthA is 1 and
// the machine has AMX, on Tiles, which the caller has made, and rounded up to 16.
template <class E, int kVectors, int kRowA, int kDepthA, int kRowB, int kRowC, Into kInto>
void multiply(int64_t rows, int64_t depth, const E* a, const E* b, float* c,
              const float* scale = nullptr) {
#if defined(__AMX_BF16__)
  if constexpr (!std::is_same_v<E, float> && kDepthA == 1) {
    const int64_t whole = depth / kTile * kTile;
    if (whole > 0 && isa() == Isa::kAmxBf16) {
      for (int64_t m = 0; kInto == Into::kScaleAndAdd && m < rows; ++m) {
        for (int n = 0; n < kVectors * kLanes; n += kLanes)
          store(c + m * kRowC + n, load(c + m * kRowC + n) * load(scale + n));
      }
      multiply_on_tiles<kVectors, kRowA, kRowB, kRowC, kInto != Into::kOverwrite>(rows, whole, a, b,
                                                                                  c);
      for (int64_t m = 0; m < rows && whole < depth; m += kTileRows) {
        multiply_tile<E, kVectors, kRowA, kDepthA, kRowB, kRowC, Into::kAdd>(
            depth - whole, a + m * kRowA + whole, b + whole * kRowB, c + m * kRowC, nullptr);
      }
      return;
    }
  }
#endif
  for (int64_t m = 0; m < rows; m += kTileRows) {
    const E* tile = a + m * kRowA;
    multiply_tile<E, kVectors, kRowA, kDepthA, kRowB, kRowC, kInto>(
        depth < kLongestSum ? depth : kLongestSum, tile, b, c + m * kRowC, scale);
    for (int64_t r = kLongestSum; r < depth; r += kLongestSum) {
      multiply_tile<E, kVectors, kRowA, kDepthA, kRowB, kRowC, Into::kAdd>(
          depth - r < kLongestSum ? depth - r : kLongestSum, tile + r * kDepthA, b + r * kRowB,
          c + m * kRowC, nullptr);
    }
  }
}

}  // namespace MOR_ISA
}  // namespace mor
