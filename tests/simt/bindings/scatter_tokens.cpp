#include "../../../kernels/rows/scatter_tokens.cuh"

#include "../../../kernels/rows/gather_tokens.cuh"
#include "binding.h"

namespace {

template <class T>
mor::RowFactor<T> factor(const void* data, int64_t is_float, int64_t stride) {
  return {data, is_float != 0, stride};
}

}  // namespace

SIMT_EXPORT int gather_tokens_backward(int64_t dtype, const void* grad, int64_t grad_stride,
                                       const int64_t* rows, void* grad_x, int* scratch,
                                       int64_t num_rows, int64_t num_taken, int64_t width) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      return mor::launch_gather_tokens_backward(static_cast<const T*>(grad), grad_stride, rows,
                                                static_cast<T*>(grad_x), scratch, num_rows,
                                                num_taken, width, nullptr);
    });
  });
}

// float_factors: 1 gate is float, 2 base_scale is.
SIMT_EXPORT int scatter_tokens(int64_t dtype, void* out, int64_t out_stride, const void* base,
                               int64_t base_stride, const void* updates, int64_t updates_stride,
                               const int64_t* rows, const void* gate, const void* base_scale,
                               int64_t float_factors, int* scratch, int64_t num_rows,
                               int64_t num_updates, int64_t width) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      mor::RowSums<T> sums{};
      sums.out = static_cast<T*>(out);
      sums.out_stride = out_stride;
      sums.base = static_cast<const T*>(base);
      sums.base_stride = base_stride;
      sums.base_scale = factor<T>(base_scale, float_factors & 2, 1);
      sums.updates = static_cast<const T*>(updates);
      sums.updates_stride = updates_stride;
      sums.gate = factor<T>(gate, float_factors & 1, 1);
      sums.rows = rows;
      sums.num_rows = num_rows;
      sums.num_updates = num_updates;
      sums.width = width;
      return mor::launch_row_sums(sums, scratch, nullptr);
    });
  });
}

SIMT_EXPORT int scatter_tokens_backward(int64_t dtype, const void* grad, int64_t grad_stride,
                                        const void* base, int64_t base_stride, const void* updates,
                                        int64_t updates_stride, const int64_t* rows,
                                        const void* gate, const void* base_scale,
                                        int64_t float_factors, void* grad_base, void* grad_updates,
                                        void* grad_gate, void* grad_base_scale, int64_t num_rows,
                                        int64_t num_updates, int64_t width) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      mor::ScatterBackward<T> args{};
      args.grad = static_cast<const T*>(grad);
      args.grad_stride = grad_stride;
      args.base = static_cast<const T*>(base);
      args.base_stride = base_stride;
      args.updates = static_cast<const T*>(updates);
      args.updates_stride = updates_stride;
      args.rows = rows;
      args.gate = factor<T>(gate, float_factors & 1, 1);
      args.base_scale = factor<T>(base_scale, float_factors & 2, 1);
      args.grad_base = static_cast<T*>(grad_base);
      args.grad_updates = static_cast<T*>(grad_updates);
      args.grad_gate = grad_gate;
      args.grad_base_scale = grad_base_scale;
      args.num_rows = num_rows;
      args.num_updates = num_updates;
      args.width = width;
      return mor::launch_scatter_tokens_backward(args, nullptr);
    });
  });
}
