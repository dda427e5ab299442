// Blocks of scores for route_topk and route_threshold. Included by *.simd.cpp only.
#pragma once

#include <type_traits>

#include "csrc/cpu/routing/compact.h"
#include "csrc/cpu/routing/route_topk.simd.h"

namespace mor {
namespace MOR_ISA {

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Bits of a block above and equal to the threshold.
template <class T>
void compare_block(const T* scores, acc_t<T> threshold, uint64_t* above, uint64_t* equal) {
  uint64_t greater = 0, same = 0;
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < kBlock; ++i) {
      greater |= static_cast<uint64_t>(scores[i] > threshold) << i;
      same |= static_cast<uint64_t>(scores[i] == threshold) << i;
    }
  } else {
    const VecF limit = splat(threshold);
    for (int i = 0; i < kBlock; i += kLanes) {
      const VecF score = load(scores + i);
      greater |= lane_bits(score > limit) << i;
      same |= lane_bits(score == limit) << i;
    }
  }
  *above = greater;
  *equal = same;
}

// Blocks of kBlock rows, the last one padded, so that no loop below has a tail.
template <class T, class Body>
void for_each_block(const RouteTopkSequence& s, Body&& body) {
  const T* scores = static_cast<const T*>(s.scores);
  for (int64_t row = s.begin; row < s.end; row += kBlock) {
    const int64_t count = s.end - row;
    if (count >= kBlock) {
      body(row, scores + row, s.candidates ? true_bits(s.candidates + row) : ~uint64_t{0},
           s.protected_rows ? true_bits(s.protected_rows + row) : uint64_t{0});
      continue;
    }
    T padded[kBlock] = {};
    uint8_t mask[2][kBlock] = {};
    std::memcpy(padded, scores + row, count * sizeof(T));
    if (s.candidates) std::memcpy(mask[0], s.candidates + row, count);
    if (s.protected_rows) std::memcpy(mask[1], s.protected_rows + row, count);
    body(row, padded, s.candidates ? true_bits(mask[0]) : first_bits(count), true_bits(mask[1]));
  }
}

// Calls body with a value of the C++ type of the scores.
template <class Body>
void dispatch_scores(torch::headeronly::ScalarType dtype, Body&& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      return body(double{});
  }
}

}  // namespace MOR_ISA
}  // namespace mor
