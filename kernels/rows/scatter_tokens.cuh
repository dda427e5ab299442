// out = base_scale * base; out[rows[i]] += gate[i] * updates[i] (row_sums.cuh does the sum), and
// the gradients of all four operands.
#pragma once

#include "row_sums.cuh"

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
  int64_t num_rows, num_updates, width;
};

// One warp, one row: out = factor * grad; the inner product of grad and other, added up in a fixed
// order, goes to dot[index] (of the type of the factor). Null: not asked for.
template <class T, int kPack>
__device__ __forceinline__ void backward_row(const T* grad, const T* other, T* out, void* dot,
                                             const RowFactor<T>& factors, int64_t index,
                                             int64_t width) {
  const int lane = threadIdx.x % 32;
  const acc_t<T> factor = factors.at(index);
  acc_t<T> sum = 0;
  for (int64_t d = lane * kPack; d < width; d += 32 * kPack) {
    const auto g = *reinterpret_cast<const Pack<T, kPack>*>(grad + d);
    if (dot != nullptr) {
      const auto o = *reinterpret_cast<const Pack<T, kPack>*>(other + d);
#pragma unroll
      for (int k = 0; k < kPack; ++k) sum += to_acc(g.v[k]) * to_acc(o.v[k]);
    }
    if (out != nullptr) {
      Pack<T, kPack> scaled;
#pragma unroll
      for (int k = 0; k < kPack; ++k) scaled.v[k] = from_acc<T>(factor * to_acc(g.v[k]));
      *reinterpret_cast<Pack<T, kPack>*>(out + d) = scaled;
    }
  }
  if (dot == nullptr) return;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (lane != 0) return;
  if (factors.is_float) {
    static_cast<float*>(dot)[index] = float(sum);
  } else {
    static_cast<T*>(dot)[index] = from_acc<T>(sum);
  }
}

// A warp owns one item at a time: an update (its row and gate) or, after all updates, a row (base
// and base_scale). A lane owns kPack elements of every 32 * kPack.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    scatter_tokens_backward_kernel(ScatterBackward<T> a, int64_t update_items, int64_t items) {
  for (int64_t item = row_item(); item < items; item += row_item_step()) {
    if (item < update_items) {
      backward_row<T, kPack>(a.grad + a.rows[item] * a.grad_stride,
                             a.updates != nullptr ? a.updates + item * a.updates_stride : nullptr,
                             a.grad_updates != nullptr ? a.grad_updates + item * a.width : nullptr,
                             a.grad_gate, a.gate, item, a.width);
    } else {
      const int64_t n = item - update_items;
      backward_row<T, kPack>(a.grad + n * a.grad_stride,
                             a.base != nullptr ? a.base + n * a.base_stride : nullptr,
                             a.grad_base != nullptr ? a.grad_base + n * a.width : nullptr,
                             a.grad_base_scale, a.base_scale, n, a.width);
    }
  }
}

template <class T>
cudaError_t launch_scatter_tokens_backward(const ScatterBackward<T>& a, cudaStream_t stream) {
  const bool updates = a.grad_updates != nullptr || a.grad_gate != nullptr;
  const bool rows = a.grad_base != nullptr || a.grad_base_scale != nullptr;
  const int64_t update_items = updates ? a.num_updates : 0,
                items = update_items + (rows ? a.num_rows : 0);
  if (items == 0) return cudaSuccess;
  const uintptr_t bits = row_bits(a.grad, a.grad_stride) | row_bits(a.base, a.base_stride) |
                         row_bits(a.updates, a.updates_stride) | row_bits(a.grad_base, a.width) |
                         row_bits(a.grad_updates, a.width);
  const auto kernel = packs<T>(bits, a.width) ? scatter_tokens_backward_kernel<T, 16 / sizeof(T)>
                                              : scatter_tokens_backward_kernel<T, 1>;
  MOR_LAUNCH(kernel, row_grid(items), kRowThreads, 0, stream, a, update_items, items);
  return cudaGetLastError();
}

}  // namespace mor
