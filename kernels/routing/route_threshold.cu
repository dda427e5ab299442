#include "route_threshold.cuh"

#include <tuple>

#include "../../csrc/ops/route_threshold.h"
#include "../glue.h"

namespace mor {
namespace {

// The one place where an operator waits for the device: the size of a tensor is needed.
int64_t read_count(const int32_t* count, cudaStream_t stream) {
  int32_t value = 0;
  check_launch(cudaMemcpyAsync(&value, count, sizeof value, cudaMemcpyDeviceToHost, stream),
               "route_threshold");
  check_launch(cudaStreamSynchronize(stream), "route_threshold");
  return value;
}

std::tuple<Tensor, Tensor> route_threshold_cuda(const Tensor& scores_in, double threshold,
                                                const std::optional<Tensor>& threshold_each,
                                                const Tensor& cu_seqlens_in, std::string kind,
                                                bool inclusive, int64_t min_k, int64_t max_k,
                                                const std::optional<Tensor>& candidates_in,
                                                std::optional<int64_t> max_rows) {
  const auto dims = check_route_threshold(scores_in, threshold, threshold_each, cu_seqlens_in, kind,
                                          inclusive, min_k, max_k, candidates_in, max_rows);
  const DeviceGuard guard(scores_in.get_device_index());
  const cudaStream_t stream = current_stream(scores_in);
  const auto new_rows = [&](int64_t size) {
    return new_tensor(scores_in, {size}, ScalarType::Long);
  };
  const Tensor scores = as_contiguous(scores_in), cu_seqlens = as_contiguous(cu_seqlens_in);
  const auto each = as_contiguous(threshold_each), candidates = as_contiguous(candidates_in);
  std::optional<Tensor> taken, totals;
  if (candidates.has_value()) {
    taken = new_rows(dims.num_sequences);
    totals = new_rows(dims.num_sequences);
  }
  Tensor counts = new_rows(dims.num_sequences);
  Tensor chosen = new_tensor(scores_in, {dims.num_sequences + 1}, ScalarType::Int);

  RouteThresholdArgs rule{};
  rule.rule = dims.kind == ThresholdKind::kMass       ? RouteRule::kMass
              : dims.kind == ThresholdKind::kQuantile ? RouteRule::kQuantile
                                                      : RouteRule::kAbsolute;
  rule.inclusive = inclusive;
  rule.threshold = threshold;
  if (each.has_value()) {
    rule.threshold_each = each->const_data_ptr();
    rule.each_is_double = each->scalar_type() == ScalarType::Double;
  }
  rule.min_k = min_k;
  rule.max_k = max_k;
  rule.max_rows = max_rows.value_or(-1);
  rule.counts = counts.mutable_data_ptr<int64_t>();
  rule.chosen = chosen.mutable_data_ptr<int32_t>();

  RouteTopkArgs args{};
  args.k_each = rule.counts;
  args.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  if (candidates.has_value()) {
    args.candidates = static_cast<const uint8_t*>(candidates->const_data_ptr());
    args.taken = taken->mutable_data_ptr<int64_t>();
    args.totals = totals->mutable_data_ptr<int64_t>();
  }
  args.num_rows = dims.num_rows;
  args.num_sequences = dims.num_sequences;
  args.fill = -1;
  std::optional<Tensor> rows;
  dispatch_floating_cuda(scores.scalar_type(), [&]<class T>(T) {
    const T* data = static_cast<const T*>(scores.const_data_ptr());
    check_launch(launch_route_threshold(data, args, rule, stream), "route_threshold");
    args.num_selected =
        max_rows.has_value() ? *max_rows : read_count(rule.chosen + dims.num_sequences, stream);
    rows = new_rows(args.num_selected);
    args.rows = rows->mutable_data_ptr<int64_t>();
    if (args.num_selected == 0) return;
    if (dims.num_sequences == 0) torch::stable::fill_(*rows, -1);
    check_launch(launch_route_topk(data, args, nullptr, stream), "route_threshold");
  });
  return {*rows, chosen};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("route_threshold", TORCH_BOX(&mor::route_threshold_cuda));
}
