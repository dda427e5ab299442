#include "../../../kernels/rows/segment_reduce.cuh"

#include "binding.h"

SIMT_EXPORT int segment_reduce(int64_t dtype, int64_t kind, void* out, void* totals, const void* x,
                               int64_t x_stride, const int64_t* segments, const void* weights,
                               int64_t float_weights, int* scratch, int64_t num_rows,
                               int64_t num_segments, int64_t width) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      mor::SegmentReduceArgs<T> args{};
      args.out = static_cast<T*>(out);
      args.totals = static_cast<mor::acc_t<T>*>(totals);
      args.x = static_cast<const T*>(x);
      args.x_stride = x_stride;
      args.weights = {weights, float_weights != 0, 1};
      args.segments = segments;
      args.num_rows = num_rows;
      args.num_segments = num_segments;
      args.width = width;
      return mor::launch_segment_reduce(args, int(kind), scratch, nullptr);
    });
  });
}

SIMT_EXPORT int segment_reduce_amax_backward(int64_t dtype, const void* grad, int64_t grad_stride,
                                             const void* x, int64_t x_stride, const void* out,
                                             const int64_t* segments, void* grad_x, int* scratch,
                                             int64_t num_rows, int64_t num_segments,
                                             int64_t width) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      mor::SegmentAmaxBackwardArgs<T> args{};
      args.grad = static_cast<const T*>(grad);
      args.grad_stride = grad_stride;
      args.x = static_cast<const T*>(x);
      args.x_stride = x_stride;
      args.out = static_cast<const T*>(out);
      args.out_stride = width;
      args.segments = segments;
      args.grad_x = static_cast<T*>(grad_x);
      args.num_rows = num_rows;
      args.num_segments = num_segments;
      args.width = width;
      return mor::launch_segment_amax_backward(args, scratch, nullptr);
    });
  });
}
