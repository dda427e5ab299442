// Transposition of 32-bit elements, kLanes by kLanes. Included by *.simd.cpp only.
#pragma once

#include <utility>

#include "csrc/cpu/simd/vec.h"

namespace mor {
namespace MOR_ISA {

// The lanes of a and b in turn, from lane kFirst on.
template <int kFirst, int... kLane>
inline VecI riffle(VecI a, VecI b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * kLanes)...);
}

// Lane j of row i becomes lane i of row j: log2(kLanes) riffles of the first half with the second.
inline void transpose(VecI (&rows)[kLanes]) {
  constexpr auto kEvery = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    VecI next[kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < kLanes / 2; ++r) {
      next[2 * r] = riffle<0>(rows[r], rows[r + kLanes / 2], kEvery);
      next[2 * r + 1] = riffle<kLanes / 2>(rows[r], rows[r + kLanes / 2], kEvery);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) rows[r] = next[r];
  }
}

// to[j][i] = from[i][j] for i < kLanes, j < min(count, kLanes); reads kLanes columns whatever the
// count.
template <class E>
inline void transpose(const E* from, int64_t from_stride, E* to, int64_t to_stride, int64_t count) {
  static_assert(sizeof(E) == 4);
  VecI rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof rows[i]);
  transpose(rows);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j)
    if (j < count) std::memcpy(to + j * to_stride, &rows[j], sizeof rows[j]);
}

}  // namespace MOR_ISA
}  // namespace mor
