// Elements of a row for *.simd.cpp: vectors of floats for the bulk, single values for its end and
// for double, under the same names, so that one kernel text serves all.
#pragma once

#include <type_traits>

#include "../row_hits.h"
#include "vec.h"

namespace mor {
namespace MOR_ISA {

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The widest accumulator of T.
template <class T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double, VecF>;

template <class V>
constexpr int64_t lanes = std::is_same_v<V, VecF> ? kLanes : 1;

template <class V, class T>
inline V get(const T* p) {
  if constexpr (std::is_same_v<V, VecF>) return load(p);
  else return static_cast<V>(*p);
}

template <class T, class V>
inline void put(T* p, V v) {
  if constexpr (std::is_same_v<V, VecF>) store(p, v);
  else *p = static_cast<T>(v);
}

template <class V>
inline auto total(V v) {
  if constexpr (std::is_same_v<V, VecF>) return reduce_add(v);
  else return v;
}

template <class Acc>
inline Acc scale_at(const RowScale& scale, int64_t i) {
  if (scale.data == nullptr) return Acc{1};
  const auto read = [&](auto* p) { return static_cast<Acc>(p[i * scale.stride]); };
  switch (scale.dtype) {
    case ScalarType::Float:
      return read(static_cast<const float*>(scale.data));
    case ScalarType::BFloat16:
      return read(static_cast<const BFloat16*>(scale.data));
    case ScalarType::Half:
      return read(static_cast<const Half*>(scale.data));
    default:
      return read(static_cast<const double*>(scale.data));
  }
}

}  // namespace MOR_ISA
}  // namespace mor
