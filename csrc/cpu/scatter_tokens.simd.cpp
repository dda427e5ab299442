#include "scatter_tokens.simd.h"

#include "simd/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

// kUnroll vectors at d: out = scale * grad, dot += grad * other; either may be absent.
template <class V, int kUnroll, class T>
void scale_part(const T* grad, acc_t<T> scale, T* out, const T* other, V* dot, int64_t d) {
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t e = d + u * lanes<V>;
    const V g = get<V>(grad + e);
    if (out != nullptr) put(out + e, g * scale);
    if (other != nullptr) dot[u] += g * get<V>(other + e);
  }
}

template <class T>
acc_t<T> scale_row(const T* grad, acc_t<T> scale, T* out, const T* other, int64_t width) {
  using V = wide_t<T>;
  V dot[4]{};
  acc_t<T> rest{};
  int64_t d = 0;
  for (; d + 4 * lanes<V> <= width; d += 4 * lanes<V>)
    scale_part<V, 4>(grad, scale, out, other, dot, d);
  for (; d + lanes<V> <= width; d += lanes<V>) scale_part<V, 1>(grad, scale, out, other, dot, d);
  for (; d < width; ++d) scale_part<acc_t<T>, 1>(grad, scale, out, other, &rest, d);
  return total((dot[0] + dot[1]) + (dot[2] + dot[3])) + rest;
}

template <class Acc>
void put_scale(void* out, ScalarType dtype, int64_t i, Acc value) {
  dispatch_floating(dtype, [&]<class T>(T) { static_cast<T*>(out)[i] = static_cast<T>(value); });
}

template <class T>
T* row(void* data, int64_t i, int64_t stride) {
  return data != nullptr ? static_cast<T*>(data) + i * stride : nullptr;
}
template <class T>
const T* row(const void* data, int64_t i, int64_t stride) {
  return data != nullptr ? static_cast<const T*>(data) + i * stride : nullptr;
}

template <class T>
void backward_hit(const ScatterBackward& a, int64_t n, int64_t i) {
  const acc_t<T> dot = scale_row(row<T>(a.grad, n, a.grad_stride), scale_at<acc_t<T>>(a.gate, i),
                                 row<T>(a.grad_updates, i, a.width),
                                 row<T>(a.updates, i, a.updates_stride), a.width);
  if (a.grad_gate != nullptr) put_scale(a.grad_gate, a.gate.dtype, i, dot);
}

}  // namespace

void scatter_backward_hits(const ScatterBackward& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&]<class T>(T) {
    for (int64_t i = begin; i < end; ++i) backward_hit<T>(a, a.hits->rows[i], i);
  });
}

void scatter_backward_rows(const ScatterBackward& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&]<class T>(T) {
    const RowHits& hits = *a.hits;
    int64_t j = hits.first_at(begin);
    for (int64_t n = begin; n < end; ++n) {
      const acc_t<T> dot =
          scale_row(row<T>(a.grad, n, a.grad_stride), scale_at<acc_t<T>>(a.base_scale, n),
                    row<T>(a.grad_base, n, a.width), row<T>(a.base, n, a.base_stride), a.width);
      if (a.grad_base_scale != nullptr) put_scale(a.grad_base_scale, a.base_scale.dtype, n, dot);
      if (a.grad_updates == nullptr && a.grad_gate == nullptr) continue;
      for (; j < hits.count && hits.rows[j] == n; ++j)
        backward_hit<T>(a, n, hits.order != nullptr ? hits.order[j] : j);
    }
  });
}

}  // namespace MOR_ISA
}  // namespace mor
