// out = base_scale * base; out[rows[i]] += gate[i] * updates[i] (row_hits.cuh does the sum), and
// the gradients of all four operands.
#pragma once

#include "row_hits.cuh"

namespace mor {

// Strides in elements; rows of outputs are packed; a null output is not asked for.
template <class T>
struct ScatterBackward {
  const T* grad;
  int64_t grad_stride;
  const T* base;  // null without grad_base_scale
  int64_t base_stride;
  const T* updates;  // null without grad_gate
  int64_t updates_stride;
  const int64_t* rows;
  RowFactor<T> gate, base_scale;
  T* grad_base;
  T* grad_updates;
  void* grad_gate;        // of the type of gate
  void* grad_base_scale;  // of the type of base_scale
  int64_t num_rows, num_hits, width;
};

// Where item reads and writes: factor * grad goes to out, the inner product of grad and other to
// dot.
template <class T>
struct ScatterBackwardItem {
  const T* grad;
  const T* other;
  T* out;
  void* dot;
  int64_t dot_index;
  RowFactor<T> factor;
};

template <class T>
__device__ __forceinline__ ScatterBackwardItem<T> backward_item(const ScatterBackward<T>& a,
                                                                int64_t item, int64_t hit_items) {
  if (item < hit_items) {
    return {a.grad + a.rows[item] * a.grad_stride,
            a.updates != nullptr ? a.updates + item * a.updates_stride : nullptr,
            a.grad_updates != nullptr ? a.grad_updates + item * a.width : nullptr,
            a.grad_gate,
            item,
            a.gate};
  }
  const int64_t n = item - hit_items;
  return {a.grad + n * a.grad_stride,
          a.base != nullptr ? a.base + n * a.base_stride : nullptr,
          a.grad_base != nullptr ? a.grad_base + n * a.width : nullptr,
          a.grad_base_scale,
          n,
          a.base_scale};
}

// A warp owns one item at a time: a hit (its update's row and gate) or, after all hits, a row (base
// and base_scale). A lane owns kPack elements of every 32 * kPack; the warp adds up the inner
// product in a fixed order.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    scatter_tokens_backward_kernel(ScatterBackward<T> a, int64_t hit_items, int64_t items) {
  const int lane = threadIdx.x % 32;
  for (int64_t item = row_item(); item < items; item += row_item_step()) {
    const auto at = backward_item(a, item, hit_items);
    const acc_t<T> factor = at.factor.at(at.dot_index);
    acc_t<T> dot = 0;
    for (int64_t d = lane * kPack; d < a.width; d += 32 * kPack) {
      const auto grad = *reinterpret_cast<const Pack<T, kPack>*>(at.grad + d);
      if (at.other != nullptr) {
        const auto other = *reinterpret_cast<const Pack<T, kPack>*>(at.other + d);
#pragma unroll
        for (int k = 0; k < kPack; ++k) dot += to_acc(grad.v[k]) * to_acc(other.v[k]);
      }
      if (at.out != nullptr) {
        Pack<T, kPack> out;
#pragma unroll
        for (int k = 0; k < kPack; ++k) out.v[k] = from_acc<T>(factor * to_acc(grad.v[k]));
        *reinterpret_cast<Pack<T, kPack>*>(at.out + d) = out;
      }
    }
    if (at.dot == nullptr) continue;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
    if (lane != 0) continue;
    if (at.factor.is_float) {
      static_cast<float*>(at.dot)[at.dot_index] = float(dot);
    } else {
      static_cast<T*>(at.dot)[at.dot_index] = from_acc<T>(dot);
    }
  }
}

template <class T>
cudaError_t launch_scatter_tokens_backward(const ScatterBackward<T>& a, cudaStream_t stream) {
  const bool hits = a.grad_updates != nullptr || a.grad_gate != nullptr;
  const bool rows = a.grad_base != nullptr || a.grad_base_scale != nullptr;
  const int64_t hit_items = hits ? a.num_hits : 0, items = hit_items + (rows ? a.num_rows : 0);
  if (items == 0) return cudaSuccess;
  const uintptr_t bits = row_bits(a.grad, a.grad_stride) | row_bits(a.base, a.base_stride) |
                         row_bits(a.updates, a.updates_stride) | row_bits(a.grad_base, a.width) |
                         row_bits(a.grad_updates, a.width);
  const auto kernel = packs<T>(bits, a.width) ? scatter_tokens_backward_kernel<T, 16 / sizeof(T)>
                                              : scatter_tokens_backward_kernel<T, 1>;
  MOR_LAUNCH(kernel, row_grid(items), kRowThreads, 0, stream, a, hit_items, items);
  return cudaGetLastError();
}

}  // namespace mor
