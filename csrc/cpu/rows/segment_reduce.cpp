#include "csrc/ops/segment_reduce.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/cpu/memory/output_cache.h"
#include "csrc/cpu/rows/segment_reduce.simd.h"

namespace mor {
namespace {

// Segments for one task, which reads as many rows as there are in them on average.
int64_t segments_per_task(const SegmentReduceDims& dims, int64_t row_bytes) {
  const int64_t rows = dims.num_rows / std::max<int64_t>(dims.num_segments, 1) + 1;
  return rows_per_task(rows * row_bytes);
}

std::tuple<Tensor, Tensor> segment_reduce_cpu(const Tensor& x_in, const Tensor& segments_in,
                                              int64_t num_segments, std::string reduce,
                                              const std::optional<Tensor>& weights) {
  const auto dims = check_segment_reduce(x_in, segments_in, num_segments, reduce, weights);
  const Rows x = contiguous_rows(x_in);
  const Tensor segments = as_contiguous(segments_in);
  const RowEntries entries = sort_entries(segments.const_data_ptr<int64_t>(), dims.num_rows,
                                          num_segments, "segment_reduce", "segments");
  Tensor out = new_result(x_in, {num_segments, dims.width});
  const bool is_double = x_in.scalar_type() == ScalarType::Double;
  Tensor totals = new_tensor(x_in, {dims.reduce == Reduce::kMean ? num_segments : 0},
                             is_double ? ScalarType::Double : ScalarType::Float);
  const int64_t bytes = dims.width * x_in.element_size();
  SegmentReduce args{};
  args.dtype = x_in.scalar_type();
  args.reduce = dims.reduce;
  args.width = dims.width;
  args.x = x.data;
  args.x_stride = x.stride;
  args.weights = row_scale(weights);
  args.entries = &entries;
  args.out = out.mutable_data_ptr();
  args.totals = totals.mutable_data_ptr();
  args.stream = streams(args.out, num_segments, bytes);
  const auto run = MOR_BEST(segment_reduce_rows);
  torch::stable::parallel_for(0, num_segments, segments_per_task(dims, bytes),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return {out, totals};
}

Tensor segment_reduce_amax_backward_cpu(const Tensor& grad_in, const Tensor& x_in,
                                        const Tensor& out_in, const Tensor& segments_in) {
  const auto dims = check_segment_reduce_amax_backward(grad_in, x_in, out_in, segments_in);
  const Rows grad = contiguous_rows(grad_in), x = contiguous_rows(x_in),
             out = contiguous_rows(out_in);
  const Tensor segments = as_contiguous(segments_in);
  const RowEntries entries =
      sort_entries(segments.const_data_ptr<int64_t>(), dims.num_rows, dims.num_segments,
                   "segment_reduce_amax_backward", "segments");
  Tensor grad_x = new_result(x_in, {dims.num_rows, dims.width});
  const SegmentAmaxBackward args{grad_in.scalar_type(),
                                 dims.width,
                                 grad.data,
                                 grad.stride,
                                 x.data,
                                 x.stride,
                                 out.data,
                                 out.stride,
                                 &entries,
                                 grad_x.mutable_data_ptr()};
  const auto run = MOR_BEST(segment_amax_backward_rows);
  torch::stable::parallel_for(0, dims.num_segments,
                              segments_per_task(dims, dims.width * x_in.element_size()),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return grad_x;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("segment_reduce", TORCH_BOX(&mor::segment_reduce_cpu));
  m.impl("segment_reduce_amax_backward", TORCH_BOX(&mor::segment_reduce_amax_backward_cpu));
}
