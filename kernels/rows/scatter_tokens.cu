#include "scatter_tokens.cuh"

#include <tuple>

#include "../../csrc/ops/scatter_tokens.h"
#include "../../csrc/rows.h"
#include "row_sums.h"

namespace mor {
namespace {

using OptionalTensor = std::optional<Tensor>;

// out [N, D] with contiguous rows, perhaps base itself.
void scatter_into(Tensor& out, const Tensor& base_in, const Tensor& updates_in,
                  const Tensor& rows_in, const OptionalTensor& gate,
                  const OptionalTensor& base_scale, const ScatterTokensDims& dims, const char* op) {
  const Rows base = contiguous_rows(base_in), updates = contiguous_rows(updates_in);
  const Tensor rows = as_contiguous(rows_in);
  Tensor scratch = range_scratch(rows, dims.num_rows, op);
  dispatch_floating_cuda(base_in.scalar_type(), [&]<class T>(T) {
    RowSums<T> sums{};
    sums.out = static_cast<T*>(out.mutable_data_ptr());
    sums.out_stride = out.stride(0);
    sums.base = static_cast<const T*>(base.data);
    sums.base_stride = base.stride;
    sums.base_scale = row_factor<T>(base_scale);
    sums.updates = static_cast<const T*>(updates.data);
    sums.updates_stride = updates.stride;
    sums.gate = row_factor<T>(gate);
    sums.rows = rows.const_data_ptr<int64_t>();
    sums.num_rows = dims.num_rows;
    sums.num_updates = dims.num_updates;
    sums.width = dims.width;
    check_launch(launch_row_sums(sums, scratch.mutable_data_ptr<int>(), current_stream(out)), op);
  });
}

Tensor scatter_tokens_cuda(const Tensor& base, const Tensor& updates, const Tensor& rows,
                           const OptionalTensor& gate, const OptionalTensor& base_scale) {
  const auto dims = check_scatter_tokens(base, updates, rows, gate, base_scale);
  const DeviceGuard guard(base.get_device_index());
  Tensor out = new_tensor(base, {dims.num_rows, dims.width});
  scatter_into(out, base, updates, rows, gate, base_scale, dims, "scatter_tokens");
  return out;
}

void scatter_tokens_in_place_cuda(Tensor base, const Tensor& updates, const Tensor& rows,
                                  const OptionalTensor& gate, const OptionalTensor& base_scale) {
  const auto dims = check_scatter_tokens_(base, updates, rows, gate, base_scale);
  const DeviceGuard guard(base.get_device_index());
  if (dims.width <= 1 || base.stride(1) == 1) {
    scatter_into(base, base, updates, rows, gate, base_scale, dims, "scatter_tokens_");
  } else {  // rows in pieces: through a contiguous copy
    Tensor copy = as_contiguous(base);
    scatter_into(copy, copy, updates, rows, gate, base_scale, dims, "scatter_tokens_");
    torch::stable::copy_(base, copy);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_tokens_backward_cuda(
    const Tensor& grad_in, const OptionalTensor& base_in, const OptionalTensor& updates_in,
    const Tensor& rows_in, const OptionalTensor& gate, const OptionalTensor& base_scale,
    bool need_base, bool need_updates) {
  const auto dims =
      check_scatter_tokens_backward(grad_in, base_in, updates_in, rows_in, gate, base_scale);
  const DeviceGuard guard(grad_in.get_device_index());
  need_base = need_base && base_scale.has_value();
  const auto none = [&] { return new_tensor(grad_in, {0}); };
  const auto like_grad = [&](int64_t num_rows) {
    return new_tensor(grad_in, {num_rows, dims.width});
  };
  Tensor grad_base = need_base ? like_grad(dims.num_rows) : none();
  Tensor grad_updates = need_updates ? like_grad(dims.num_updates) : none();
  Tensor grad_gate = updates_in.has_value() ? new_tensor(*gate, {dims.num_updates}) : none();
  Tensor grad_base_scale = base_in.has_value() ? new_tensor(*base_scale, {dims.num_rows}) : none();

  const Tensor rows = as_contiguous(rows_in);
  const Rows grad = contiguous_rows(grad_in);
  std::optional<Rows> base, updates;
  if (base_in.has_value()) base = contiguous_rows(*base_in);
  if (updates_in.has_value()) updates = contiguous_rows(*updates_in);
  dispatch_floating_cuda(grad_in.scalar_type(), [&]<class T>(T) {
    ScatterBackward<T> args{};
    args.grad = static_cast<const T*>(grad.data);
    args.grad_stride = grad.stride;
    args.rows = rows.const_data_ptr<int64_t>();
    args.gate = row_factor<T>(gate);
    args.base_scale = row_factor<T>(base_scale);
    if (base.has_value()) {
      args.base = static_cast<const T*>(base->data);
      args.base_stride = base->stride;
      args.grad_base_scale = grad_base_scale.mutable_data_ptr();
    }
    if (updates.has_value()) {
      args.updates = static_cast<const T*>(updates->data);
      args.updates_stride = updates->stride;
      args.grad_gate = grad_gate.mutable_data_ptr();
    }
    if (need_base) args.grad_base = static_cast<T*>(grad_base.mutable_data_ptr());
    if (need_updates) args.grad_updates = static_cast<T*>(grad_updates.mutable_data_ptr());
    args.num_rows = dims.num_rows;
    args.num_updates = dims.num_updates;
    args.width = dims.width;
    check_launch(launch_scatter_tokens_backward(args, current_stream(grad_in)),
                 "scatter_tokens_backward");
  });
  return {grad_base, grad_updates, grad_gate, grad_base_scale};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("scatter_tokens", TORCH_BOX(&mor::scatter_tokens_cuda));
  m.impl("scatter_tokens_", TORCH_BOX(&mor::scatter_tokens_in_place_cuda));
  m.impl("scatter_tokens_backward", TORCH_BOX(&mor::scatter_tokens_backward_cuda));
}
