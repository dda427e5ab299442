#include "csrc/cpu/rows/row_sums.simd.h"

#include <algorithm>
#include <vector>

#include "csrc/cpu/rows/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

template <class T>
struct Entry {
  const T* update;
  acc_t<T> gate;
};

// The entries on one row.
template <class T>
struct Entries {
  const Entry<T>*begin, *end;
};

// kUnroll vectors of one output row at d, held in registers over its entries.
template <class V, int kUnroll, bool kStream, class T>
[[gnu::always_inline]] inline void sum_part(Entries<T> entries, T* out, const T* base,
                                            acc_t<T> scale, int64_t d) {
  V acc[kUnroll]{};
  if (base != nullptr)
    for (int u = 0; u < kUnroll; ++u) acc[u] = get<V>(base + d + u * lanes<V>);
  if (scale != 1)
    for (int u = 0; u < kUnroll; ++u) acc[u] = acc[u] * scale;
  for (const Entry<T>* entry = entries.begin; entry != entries.end; ++entry)
    for (int u = 0; u < kUnroll; ++u)
      acc[u] += get<V>(entry->update + d + u * lanes<V>) * entry->gate;
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (kStream && lanes<V> > 1) stream(out + d + u * lanes<V>, acc[u]);
    else put(out + d + u * lanes<V>, acc[u]);
  }
}

// next: the row of base to ask for meanwhile, or null.
template <class T, bool kStream>
void sum_row(const RowSums& sums, int64_t n, Entries<T> entries, const T* next) {
  using V = wide_t<T>;
  using Short = short_t<T>;
  constexpr int64_t kPart = 4 * lanes<V>, kLine = 64 / sizeof(T);
  const int64_t width = sums.width;
  T* out = static_cast<T*>(sums.out) + n * sums.out_stride;
  const T* base =
      sums.base != nullptr ? static_cast<const T*>(sums.base) + n * sums.base_stride : nullptr;
  if (entries.begin == entries.end && base != nullptr && sums.base_scale.data == nullptr) {
    const auto* in = reinterpret_cast<const char*>(base);
    if (base != out) copy_row<kStream>(reinterpret_cast<char*>(out), in, width * sizeof(T), in);
    return;
  }
  const acc_t<T> scale = scale_at<acc_t<T>>(sums.base_scale, n);
  int64_t d = 0;
  for (; d + kPart <= width; d += kPart) {
    if (next != nullptr)
      for (int64_t e = d; e < d + kPart; e += kLine) __builtin_prefetch(next + e);
    sum_part<V, 4, kStream>(entries, out, base, scale, d);
  }
  for (; d + lanes<V> <= width; d += lanes<V>)
    sum_part<V, 1, kStream>(entries, out, base, scale, d);
  for (; d + lanes<Short> <= width; d += lanes<Short>)
    sum_part<Short, 1, kStream>(entries, out, base, scale, d);
  for (; d < width; ++d) sum_part<acc_t<T>, 1, false>(entries, out, base, scale, d);
}

// Takes the entries on row n from `first` on; returns the first one on a later row.
template <class T>
int64_t take_entries(const RowSums& sums, int64_t n, int64_t first, std::vector<Entry<T>>& out) {
  out.clear();
  const RowEntries& entries = *sums.entries;
  for (; first < entries.count && entries.rows[first] == n; ++first) {
    const int64_t i = entries.order != nullptr ? entries.order[first] : first;
    out.push_back({static_cast<const T*>(sums.updates) + i * sums.updates_stride,
                   scale_at<acc_t<T>>(sums.gate, i)});
  }
  return first;
}

template <class T, bool kStream>
void sum_every(const RowSums& sums, int64_t begin, int64_t end) {
  std::vector<Entry<T>> entries;
  int64_t j = first_entry(*sums.entries, begin);
  for (int64_t n = begin; n < end; ++n) {
    j = take_entries(sums, n, j, entries);
    sum_row<T, kStream>(sums, n, {entries.data(), entries.data() + entries.size()}, nullptr);
  }
  if (kStream) stream_fence();
}

}  // namespace

RowOrder scan_rows(const int64_t* rows, int64_t count, int64_t num_rows) {
  // Branch-free, so that it vectorises.
  uint64_t outside = 0, descends = 0;
  for (int64_t i = 0; i < count; ++i)
    outside |= static_cast<uint64_t>(rows[i]) >= static_cast<uint64_t>(num_rows);
  for (int64_t i = 1; i < count; ++i) descends |= rows[i] < rows[i - 1];
  return {outside == 0, descends != 0};
}

void sum_rows(const RowSums& sums, int64_t begin, int64_t end) {
  dispatch_floating(sums.dtype, [&]<class T>(T) {
    sums.stream ? sum_every<T, true>(sums, begin, end) : sum_every<T, false>(sums, begin, end);
  });
}

void sum_updated_rows(const RowSums& sums, int64_t begin, int64_t end) {
  dispatch_floating(sums.dtype, [&]<class T>(T) {
    const int64_t* rows = sums.entries->rows;
    const int64_t ahead = rows_ahead(sums.width * sizeof(T));
    std::vector<Entry<T>> entries;
    int64_t j = begin;
    while (j > 0 && j < end && rows[j] == rows[j - 1]) ++j;
    while (j < end) {
      const int64_t n = rows[j];
      const T* next = static_cast<const T*>(sums.base) +
                      rows[std::min(j + ahead, sums.entries->count - 1)] * sums.base_stride;
      j = take_entries(sums, n, j, entries);
      sum_row<T, false>(sums, n, {entries.data(), entries.data() + entries.size()}, next);
    }
  });
}

}  // namespace MOR_ISA
}  // namespace mor
