#include "csrc/cpu/rows/row_sums.simd.h"

#include <algorithm>
#include <vector>

#include "csrc/cpu/rows/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

template <class T>
struct Hit {
  const T* update;
  acc_t<T> gate;
};

// The hits on one row.
template <class T>
struct Hits {
  const Hit<T>*begin, *end;
};

// kUnroll vectors of one output row at d, held in registers over its hits.
template <class V, int kUnroll, bool kStream, class T>
[[gnu::always_inline]] inline void sum_part(Hits<T> hits, T* out, const T* base, acc_t<T> scale,
                                            int64_t d) {
  V acc[kUnroll]{};
  if (base != nullptr)
    for (int u = 0; u < kUnroll; ++u) acc[u] = get<V>(base + d + u * lanes<V>);
  if (scale != 1)
    for (int u = 0; u < kUnroll; ++u) acc[u] = acc[u] * scale;
  for (const Hit<T>* hit = hits.begin; hit != hits.end; ++hit)
    for (int u = 0; u < kUnroll; ++u) acc[u] += get<V>(hit->update + d + u * lanes<V>) * hit->gate;
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (kStream && lanes<V> > 1) stream(out + d + u * lanes<V>, acc[u]);
    else put(out + d + u * lanes<V>, acc[u]);
  }
}

// next: the row of base to ask for meanwhile, or null.
template <class T, bool kStream>
void sum_row(const RowSums& sums, int64_t n, Hits<T> hits, const T* next) {
  using V = wide_t<T>;
  using Short = short_t<T>;
  constexpr int64_t kPart = 4 * lanes<V>, kLine = 64 / sizeof(T);
  const int64_t width = sums.width;
  T* out = static_cast<T*>(sums.out) + n * sums.out_stride;
  const T* base =
      sums.base != nullptr ? static_cast<const T*>(sums.base) + n * sums.base_stride : nullptr;
  if (hits.begin == hits.end && base != nullptr && sums.base_scale.data == nullptr) {
    const auto* in = reinterpret_cast<const char*>(base);
    if (base != out) copy_row<kStream>(reinterpret_cast<char*>(out), in, width * sizeof(T), in);
    return;
  }
  const acc_t<T> scale = scale_at<acc_t<T>>(sums.base_scale, n);
  int64_t d = 0;
  for (; d + kPart <= width; d += kPart) {
    if (next != nullptr)
      for (int64_t e = d; e < d + kPart; e += kLine) __builtin_prefetch(next + e);
    sum_part<V, 4, kStream>(hits, out, base, scale, d);
  }
  for (; d + lanes<V> <= width; d += lanes<V>) sum_part<V, 1, kStream>(hits, out, base, scale, d);
  for (; d + lanes<Short> <= width; d += lanes<Short>)
    sum_part<Short, 1, kStream>(hits, out, base, scale, d);
  for (; d < width; ++d) sum_part<acc_t<T>, 1, false>(hits, out, base, scale, d);
}

// Takes the hits on row n from `first` on; returns the first one on a later row.
template <class T>
int64_t take_hits(const RowSums& sums, int64_t n, int64_t first, std::vector<Hit<T>>& out) {
  out.clear();
  const RowHits& hits = *sums.hits;
  for (; first < hits.count && hits.rows[first] == n; ++first) {
    const int64_t i = hits.order != nullptr ? hits.order[first] : first;
    out.push_back({static_cast<const T*>(sums.updates) + i * sums.updates_stride,
                   scale_at<acc_t<T>>(sums.gate, i)});
  }
  return first;
}

template <class T, bool kStream>
void sum_every(const RowSums& sums, int64_t begin, int64_t end) {
  std::vector<Hit<T>> hits;
  int64_t j = first_hit(*sums.hits, begin);
  for (int64_t n = begin; n < end; ++n) {
    j = take_hits(sums, n, j, hits);
    sum_row<T, kStream>(sums, n, {hits.data(), hits.data() + hits.size()}, nullptr);
  }
  if (kStream) stream_fence();
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
    sums.stream ? sum_every<T, true>(sums, begin, end) : sum_every<T, false>(sums, begin, end);
  });
}

void sum_hit_rows(const RowSums& sums, int64_t begin, int64_t end) {
  dispatch_floating(sums.dtype, [&]<class T>(T) {
    const int64_t* rows = sums.hits->rows;
    const int64_t ahead = rows_ahead(sums.width * sizeof(T));
    std::vector<Hit<T>> hits;
    int64_t j = begin;
    while (j > 0 && j < end && rows[j] == rows[j - 1]) ++j;
    while (j < end) {
      const int64_t n = rows[j];
      const T* next = static_cast<const T*>(sums.base) +
                      rows[std::min(j + ahead, sums.hits->count - 1)] * sums.base_stride;
      j = take_hits(sums, n, j, hits);
      sum_row<T, false>(sums, n, {hits.data(), hits.data() + hits.size()}, next);
    }
  });
}

}  // namespace MOR_ISA
}  // namespace mor
