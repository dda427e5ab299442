#include "csrc/cpu/rows/scatter_tokens.simd.h"

#include <algorithm>

#include "csrc/cpu/rows/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

// One row: out = scale * grad, and the inner product of grad and other; either may be absent.
template <class T>
struct ScaledRow {
  const T* grad;
  acc_t<T> scale;
  T* out;
  const T* other;
};

// kUnroll vectors of a row at d.
template <class V, int kUnroll, bool kStream, class T>
[[gnu::always_inline]] inline void scale_part(const ScaledRow<T>& row, V* dot, int64_t d) {
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t e = d + u * lanes<V>;
    const V g = get<V>(row.grad + e);
    if (row.other != nullptr) dot[u] += g * get<V>(row.other + e);
    if (row.out == nullptr) continue;
    if constexpr (kStream && lanes<V> > 1) stream(row.out + e, g * row.scale);
    else put(row.out + e, g * row.scale);
  }
}

// next: the row of grad to ask for meanwhile.
template <class T, bool kStream>
acc_t<T> scale_row(const ScaledRow<T> row, int64_t width, const T* next) {
  using V = wide_t<T>;
  using Short = short_t<T>;
  constexpr int64_t kPart = 4 * lanes<V>, kLine = 64 / sizeof(T);
  V dot[4]{};
  Short dot_short{};
  acc_t<T> rest{};
  int64_t d = 0;
  for (; d + kPart <= width; d += kPart) {
    for (int64_t e = d; e < d + kPart; e += kLine) __builtin_prefetch(next + e);
    scale_part<V, 4, kStream>(row, dot, d);
  }
  for (; d + lanes<V> <= width; d += lanes<V>) scale_part<V, 1, kStream>(row, dot, d);
  for (; d + lanes<Short> <= width; d += lanes<Short>)
    scale_part<Short, 1, kStream>(row, &dot_short, d);
  for (; d < width; ++d) scale_part<acc_t<T>, 1, false>(row, &rest, d);
  return total((dot[0] + dot[1]) + (dot[2] + dot[3])) + total(dot_short) + rest;
}

template <class Acc>
void put_scale(void* out, ScalarType dtype, int64_t i, Acc value) {
  if (out == nullptr) return;
  dispatch_floating(dtype, [&]<class T>(T) { static_cast<T*>(out)[i] = static_cast<T>(value); });
}

template <class T>
T* row_at(void* data, int64_t i, int64_t stride) {
  return data != nullptr ? static_cast<T*>(data) + i * stride : nullptr;
}
template <class T>
const T* row_at(const void* data, int64_t i, int64_t stride) {
  return data != nullptr ? static_cast<const T*>(data) + i * stride : nullptr;
}

template <class T, bool kStream>
void backward_entry(const ScatterBackward& a, int64_t n, int64_t i, int64_t next) {
  const ScaledRow<T> row{row_at<T>(a.grad, n, a.grad_stride), scale_at<acc_t<T>>(a.gate, i),
                         row_at<T>(a.grad_updates, i, a.width),
                         row_at<T>(a.updates, i, a.updates_stride)};
  const T* ahead = row_at<T>(a.grad, next, a.grad_stride);
  put_scale(a.grad_gate, a.gate.dtype, i, scale_row<T, kStream>(row, a.width, ahead));
}

template <class T, bool kStream>
void backward_entries(const ScatterBackward& a, int64_t begin, int64_t end) {
  const int64_t* rows = a.entries->rows;
  const int64_t ahead = rows_ahead(a.width * sizeof(T));
  for (int64_t i = begin; i < end; ++i)
    backward_entry<T, kStream>(a, rows[i], i, rows[std::min(i + ahead, end - 1)]);
  if (kStream) stream_fence();
}

template <class T, bool kStream>
void backward_rows(const ScatterBackward& a, int64_t begin, int64_t end) {
  const RowEntries& entries = *a.entries;
  int64_t j = first_entry(entries, begin);
  for (int64_t n = begin; n < end; ++n) {
    const ScaledRow<T> row{row_at<T>(a.grad, n, a.grad_stride), scale_at<acc_t<T>>(a.base_scale, n),
                           row_at<T>(a.grad_base, n, a.width), row_at<T>(a.base, n, a.base_stride)};
    put_scale(a.grad_base_scale, a.base_scale.dtype, n,
              scale_row<T, kStream>(row, a.width, row.grad));
    if (a.grad_updates == nullptr && a.grad_gate == nullptr) continue;
    for (; j < entries.count && entries.rows[j] == n; ++j)
      backward_entry<T, kStream>(a, n, entries.order != nullptr ? entries.order[j] : j, n);
  }
  if (kStream) stream_fence();
}

}  // namespace

void scatter_backward_entries(const ScatterBackward& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&]<class T>(T) {
    a.stream ? backward_entries<T, true>(a, begin, end) : backward_entries<T, false>(a, begin, end);
  });
}

void scatter_backward_rows(const ScatterBackward& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&]<class T>(T) {
    a.stream ? backward_rows<T, true>(a, begin, end) : backward_rows<T, false>(a, begin, end);
  });
}

}  // namespace MOR_ISA
}  // namespace mor
