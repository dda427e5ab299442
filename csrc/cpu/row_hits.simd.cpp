#include "row_hits.simd.h"

#include "simd/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

// kUnroll vectors of one output row, held in registers over its hits [first, last).
template <class V, int kUnroll, class T>
void sum_part(const RowSums& sums, T* out, const T* base, acc_t<T> scale, int64_t first,
              int64_t last, int64_t d) {
  V acc[kUnroll]{};
  if (base != nullptr)
    for (int u = 0; u < kUnroll; ++u) acc[u] = get<V>(base + d + u * lanes<V>) * scale;
  for (int64_t j = first; j < last; ++j) {
    const int64_t i = sums.hits->order != nullptr ? sums.hits->order[j] : j;
    const T* update = static_cast<const T*>(sums.updates) + i * sums.updates_stride + d;
    const acc_t<T> gate = scale_at<acc_t<T>>(sums.gate, i);
    for (int u = 0; u < kUnroll; ++u) acc[u] += get<V>(update + u * lanes<V>) * gate;
  }
  for (int u = 0; u < kUnroll; ++u) put(out + d + u * lanes<V>, acc[u]);
}

template <class T>
void sum_row(const RowSums& sums, int64_t n, int64_t first, int64_t last) {
  using V = wide_t<T>;
  T* out = static_cast<T*>(sums.out) + n * sums.out_stride;
  const T* base =
      sums.base != nullptr ? static_cast<const T*>(sums.base) + n * sums.base_stride : nullptr;
  if (first == last && (base == nullptr || sums.base_scale.data == nullptr)) {
    if (base == nullptr) std::memset(out, 0, sums.width * sizeof(T));
    else if (base != out) std::memcpy(out, base, sums.width * sizeof(T));
    return;
  }
  const acc_t<T> scale = scale_at<acc_t<T>>(sums.base_scale, n);
  int64_t d = 0;
  for (; d + 4 * lanes<V> <= sums.width; d += 4 * lanes<V>)
    sum_part<V, 4>(sums, out, base, scale, first, last, d);
  for (; d + lanes<V> <= sums.width; d += lanes<V>)
    sum_part<V, 1>(sums, out, base, scale, first, last, d);
  for (; d < sums.width; ++d) sum_part<acc_t<T>, 1>(sums, out, base, scale, first, last, d);
}

}  // namespace

RowOrder scan_rows(const int64_t* rows, int64_t count, int64_t num_rows) {
  // Branch-free, so that it vectorises.
  uint64_t outside = 0, falls = 0;
  for (int64_t i = 0; i < count; ++i)
    outside |= static_cast<uint64_t>(rows[i]) >= static_cast<uint64_t>(num_rows);
  for (int64_t i = 1; i < count; ++i) falls |= rows[i] < rows[i - 1];
  return {outside == 0, falls != 0};
}

void sum_rows(const RowSums& sums, int64_t begin, int64_t end) {
  dispatch_floating(sums.dtype, [&]<class T>(T) {
    const RowHits& hits = *sums.hits;
    int64_t first = hits.first_at(begin);
    for (int64_t n = begin; n < end; ++n) {
      int64_t last = first;
      while (last < hits.count && hits.rows[last] == n) ++last;
      sum_row<T>(sums, n, first, last);
      first = last;
    }
  });
}

void sum_hit_rows(const RowSums& sums, int64_t begin, int64_t end) {
  dispatch_floating(sums.dtype, [&]<class T>(T) {
    const RowHits& hits = *sums.hits;
    int64_t first = begin;
    while (first > 0 && first < end && hits.rows[first] == hits.rows[first - 1]) ++first;
    while (first < end) {
      const int64_t n = hits.rows[first];
      int64_t last = first + 1;
      while (last < hits.count && hits.rows[last] == n) ++last;
      sum_row<T>(sums, n, first, last);
      first = last;
    }
  });
}

}  // namespace MOR_ISA
}  // namespace mor
