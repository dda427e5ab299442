#include "segment_reduce.cuh"

#include <tuple>

#include "../../csrc/ops/segment_reduce.h"
#include "../../csrc/rows.h"
#include "row_sums.h"

namespace mor {
namespace {

std::tuple<Tensor, Tensor> segment_reduce_cuda(const Tensor& x_in, const Tensor& segments_in,
                                               int64_t num_segments, std::string reduce,
                                               const std::optional<Tensor>& weights) {
  const auto dims = check_segment_reduce(x_in, segments_in, num_segments, reduce, weights);
  const DeviceGuard guard(x_in.get_device_index());
  const Rows x = contiguous_rows(x_in);
  const Tensor segments = as_contiguous(segments_in);
  const bool mean = dims.reduce == Reduce::kMean;
  const bool is_double = x_in.scalar_type() == ScalarType::Double;
  Tensor out = new_tensor(x_in, {num_segments, dims.width});
  Tensor totals = new_tensor(x_in, {mean ? num_segments : 0},
                             is_double ? ScalarType::Double : ScalarType::Float);
  Tensor scratch = range_scratch(segments, num_segments, "segment_reduce");
  const int kind = mean ? kSegmentMean : dims.reduce == Reduce::kAmax ? kSegmentAmax : kSegmentSum;
  dispatch_floating_cuda(x_in.scalar_type(), [&]<class T>(T) {
    SegmentReduceArgs<T> args{};
    args.out = static_cast<T*>(out.mutable_data_ptr());
    args.totals = static_cast<acc_t<T>*>(totals.mutable_data_ptr());
    args.x = static_cast<const T*>(x.data);
    args.x_stride = x.stride;
    args.weights = row_factor<T>(weights);
    args.segments = segments.const_data_ptr<int64_t>();
    args.num_rows = dims.num_rows;
    args.num_segments = num_segments;
    args.width = dims.width;
    check_launch(
        launch_segment_reduce(args, kind, scratch.mutable_data_ptr<int>(), current_stream(x_in)),
        "segment_reduce");
  });
  return {out, totals};
}

Tensor segment_reduce_amax_backward_cuda(const Tensor& grad_in, const Tensor& x_in,
                                         const Tensor& out_in, const Tensor& segments_in) {
  const auto dims = check_segment_reduce_amax_backward(grad_in, x_in, out_in, segments_in);
  const DeviceGuard guard(x_in.get_device_index());
  const Rows grad = contiguous_rows(grad_in), x = contiguous_rows(x_in),
             out = contiguous_rows(out_in);
  const Tensor segments = as_contiguous(segments_in);
  Tensor grad_x = new_tensor(x_in, {dims.num_rows, dims.width});
  Tensor scratch = range_scratch(segments, dims.num_segments, "segment_reduce_amax_backward");
  dispatch_floating_cuda(x_in.scalar_type(), [&]<class T>(T) {
    SegmentAmaxBackwardArgs<T> args{};
    args.grad = static_cast<const T*>(grad.data);
    args.grad_stride = grad.stride;
    args.x = static_cast<const T*>(x.data);
    args.x_stride = x.stride;
    args.out = static_cast<const T*>(out.data);
    args.out_stride = out.stride;
    args.segments = segments.const_data_ptr<int64_t>();
    args.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    args.num_rows = dims.num_rows;
    args.num_segments = dims.num_segments;
    args.width = dims.width;
    check_launch(
        launch_segment_amax_backward(args, scratch.mutable_data_ptr<int>(), current_stream(x_in)),
        "segment_reduce_amax_backward");
  });
  return grad_x;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("segment_reduce", TORCH_BOX(&mor::segment_reduce_cuda));
  m.impl("segment_reduce_amax_backward", TORCH_BOX(&mor::segment_reduce_amax_backward_cuda));
}
