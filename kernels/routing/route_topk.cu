#include "route_topk.cuh"

#include "../../csrc/ops/route_topk.h"
#include "../glue.h"

namespace mor {
namespace {

Tensor route_topk_cuda(const Tensor& scores_in, int64_t k, const std::optional<Tensor>& k_each_in,
                       const Tensor& cu_seqlens_in, int64_t num_rows,
                       const std::optional<Tensor>& candidates_in,
                       const std::optional<Tensor>& protected_rows_in, bool by_score) {
  const auto dims = check_route_topk(scores_in, k, k_each_in, cu_seqlens_in, num_rows,
                                     candidates_in, protected_rows_in);
  const DeviceGuard guard(scores_in.get_device_index());
  const auto new_rows = [&](int64_t size) {
    return new_tensor(scores_in, {size}, ScalarType::Long);
  };
  if (dims.num_sequences == 0)
    return torch::stable::new_zeros(scores_in, {num_rows}, ScalarType::Long);
  Tensor rows = new_rows(num_rows);
  if (num_rows == 0) return rows;
  const Tensor scores = as_contiguous(scores_in), cu_seqlens = as_contiguous(cu_seqlens_in);
  const auto k_each = as_contiguous(k_each_in), candidates = as_contiguous(candidates_in);
  const auto protected_rows = as_contiguous(protected_rows_in);
  std::optional<Tensor> taken, totals, ascending, starts;
  if (candidates.has_value() || protected_rows.has_value()) {
    taken = new_rows(dims.num_sequences);
    totals = new_rows(dims.num_sequences);
  }
  if (by_score) {
    ascending = new_rows(num_rows);
    starts = new_rows(dims.num_sequences + 1);
  }
  const auto bytes = [](const std::optional<Tensor>& t) {
    return t.has_value() ? static_cast<const uint8_t*>(t->const_data_ptr()) : nullptr;
  };
  const auto scratch = [](const std::optional<Tensor>& t) {
    return t.has_value() ? t->mutable_data_ptr<int64_t>() : nullptr;
  };
  const RouteTopkArgs args{k,
                           k_each.has_value() ? k_each->const_data_ptr<int64_t>() : nullptr,
                           cu_seqlens.const_data_ptr<int32_t>(),
                           bytes(candidates),
                           bytes(protected_rows),
                           scratch(taken),
                           scratch(totals),
                           scratch(starts),
                           rows.mutable_data_ptr<int64_t>(),
                           dims.num_rows,
                           dims.num_sequences,
                           num_rows,
                           0};
  dispatch_floating_cuda(scores.scalar_type(), [&]<class T>(T) {
    check_launch(launch_route_topk(static_cast<const T*>(scores.const_data_ptr()), args,
                                   scratch(ascending), current_stream(scores)),
                 "route_topk");
  });
  return rows;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("route_topk", TORCH_BOX(&mor::route_topk_cuda));
}
