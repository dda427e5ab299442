// Elements of a row for *.simd.cpp: vectors of floats for the bulk (pairs of them for bfloat16),
// single values for its end and for double, under the same names, so that one kernel text serves
// all.
#pragma once

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/rows/row_sums.h"
#include "csrc/cpu/simd/vec.h"

namespace mor {
namespace MOR_ISA {

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The widest accumulator of T.
template <class T>
using wide_t = std::conditional_t<std::is_same_v<T, double>, double,
                                  std::conditional_t<std::is_same_v<T, BFloat16>, VecPair, VecF>>;

// For the end of a row, which a pair may be too long for.
template <class T>
using short_t = std::conditional_t<std::is_same_v<T, double>, double, VecF>;

template <class V>
constexpr int64_t lanes = std::is_same_v<V, VecPair> ? 2 * kLanes
                          : std::is_same_v<V, VecF>  ? kLanes
                                                     : 1;

template <class V, class T>
inline V get(const T* p) {
  if constexpr (std::is_same_v<V, VecPair>) return load_pair(p);
  else if constexpr (std::is_same_v<V, VecF>) return load(p);
  else return static_cast<V>(*p);
}

template <class T, class V>
inline void put(T* p, V v) {
  if constexpr (lanes<V> > 1) store(p, v);
  else *p = static_cast<T>(v);
}

// Stores around the cache where the instruction set can; p aligned to the vector.
template <class T, class V>
inline void stream(T* p, V v) {
  T part[lanes<V>];
  put(part, v);
#if defined(__AVX512F__)
  if constexpr (sizeof part == 64) {
    __m512i bits;
    std::memcpy(&bits, part, sizeof bits);
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof part == 32) {
    __m256i bits;
    std::memcpy(&bits, part, sizeof bits);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
  }
  if constexpr (sizeof part == 16) {
    __m128i bits;
    std::memcpy(&bits, part, sizeof bits);
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
  }
#endif
  std::memcpy(p, part, sizeof part);
}

// Streamed stores become visible to other threads.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first entry on a row >= row. Not std::lower_bound: the linker could give its one copy, built
// for this instruction set, to code for lesser machines.
inline int64_t first_entry(const RowEntries& entries, int64_t row) {
  int64_t begin = 0, end = entries.count;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    (entries.rows[middle] < row ? begin : end) = entries.rows[middle] < row ? middle + 1 : middle;
  }
  return begin;
}

// Rows that are kBytesAhead, between 1 and 16.
inline int64_t rows_ahead(int64_t bytes) {
  return std::clamp<int64_t>(kBytesAhead / std::max<int64_t>(bytes, 1), 1, 16);
}

// Copies a row while asking for the row at `next`; kStream: out and bytes are whole lines.
template <bool kStream>
inline void copy_row(char* out, const char* in, int64_t bytes, const char* next) {
  typedef char Line __attribute__((vector_size(64)));
  int64_t b = 0;
  for (; b + 64 <= bytes; b += 64) {
    __builtin_prefetch(next + b);
    if constexpr (kStream) {
      constexpr int64_t kStep = kLanes * sizeof(float);
      for (int64_t c = b; c < b + 64; c += kStep)
        stream(reinterpret_cast<float*>(out + c), load(reinterpret_cast<const float*>(in + c)));
    } else {
      Line line;
      std::memcpy(&line, in + b, 64);
      std::memcpy(out + b, &line, 64);
    }
  }
  if (b < bytes) std::memcpy(out + b, in + b, bytes - b);
}

template <class V>
inline auto total(V v) {
  if constexpr (std::is_same_v<V, VecPair>) return reduce_add(v.even + v.odd);
  else if constexpr (std::is_same_v<V, VecF>) return reduce_add(v);
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
