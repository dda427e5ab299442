#include "csrc/ops/scatter_tokens.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "csrc/cpu/memory/output_cache.h"
#include "csrc/cpu/rows/row_sums.simd.h"
#include "csrc/cpu/rows/scatter_tokens.simd.h"

namespace mor {
namespace {

using OptionalTensor = std::optional<Tensor>;

// out [N, D] with contiguous rows, perhaps base itself.
void scatter_into(Tensor& out, const Tensor& base_in, const Tensor& updates_in,
                  const Tensor& rows_in, const OptionalTensor& gate,
                  const OptionalTensor& base_scale, const ScatterTokensDims& dims, const char* op) {
  const Rows base = contiguous_rows(base_in), updates = contiguous_rows(updates_in);
  const Tensor rows = as_contiguous(rows_in);
  const RowEntries entries =
      sort_entries(rows.const_data_ptr<int64_t>(), dims.num_updates, dims.num_rows, op);
  RowSums sums{};
  sums.dtype = base_in.scalar_type();
  sums.width = dims.width;
  sums.out = out.mutable_data_ptr();
  sums.out_stride = out.stride(0);
  sums.base = base.data;
  sums.base_stride = base.stride;
  sums.base_scale = row_scale(base_scale);
  sums.updates = updates.data;
  sums.updates_stride = updates.stride;
  sums.gate = row_scale(gate);
  sums.entries = &entries;
  const int64_t bytes = dims.width * base_in.element_size();
  const bool in_place = sums.out == sums.base;
  sums.stream = !in_place && streams(sums.out, dims.num_rows, bytes);
  if (in_place && !base_scale.has_value()) {
    const auto sum = MOR_BEST(sum_updated_rows);
    torch::stable::parallel_for(0, dims.num_updates, rows_per_task(bytes),
                                [&](int64_t begin, int64_t end) { sum(sums, begin, end); });
  } else {
    const auto sum = MOR_BEST(sum_rows);
    torch::stable::parallel_for(0, dims.num_rows, rows_per_task(bytes),
                                [&](int64_t begin, int64_t end) { sum(sums, begin, end); });
  }
}

Tensor scatter_tokens_cpu(const Tensor& base, const Tensor& updates, const Tensor& rows,
                          const OptionalTensor& gate, const OptionalTensor& base_scale) {
  const auto dims = check_scatter_tokens(base, updates, rows, gate, base_scale);
  Tensor out = new_result(base, {dims.num_rows, dims.width});
  scatter_into(out, base, updates, rows, gate, base_scale, dims, "scatter_tokens");
  return out;
}

void scatter_tokens_in_place_cpu(Tensor base, const Tensor& updates, const Tensor& rows,
                                 const OptionalTensor& gate, const OptionalTensor& base_scale) {
  const auto dims = check_scatter_tokens_(base, updates, rows, gate, base_scale);
  if (dims.width <= 1 || base.stride(1) == 1) {
    scatter_into(base, base, updates, rows, gate, base_scale, dims, "scatter_tokens_");
  } else {  // rows in pieces: through a contiguous copy
    Tensor copy = as_contiguous(base);
    scatter_into(copy, copy, updates, rows, gate, base_scale, dims, "scatter_tokens_");
    torch::stable::copy_(base, copy);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_tokens_backward_cpu(
    const Tensor& grad_in, const OptionalTensor& base_in, const OptionalTensor& updates_in,
    const Tensor& rows_in, const OptionalTensor& gate, const OptionalTensor& base_scale,
    bool need_base, bool need_updates) {
  const auto dims =
      check_scatter_tokens_backward(grad_in, base_in, updates_in, rows_in, gate, base_scale);
  const char* op = "scatter_tokens_backward";
  need_base = need_base && base_scale.has_value();
  const Tensor rows = as_contiguous(rows_in);
  const auto none = [&] { return new_tensor(grad_in, {0}); };
  Tensor grad_base = need_base ? new_result(grad_in, {dims.num_rows, dims.width}) : none();
  Tensor grad_updates = need_updates ? new_result(grad_in, {dims.num_updates, dims.width}) : none();
  Tensor grad_gate = updates_in.has_value() ? new_tensor(*gate, {dims.num_updates}) : none();
  Tensor grad_base_scale = base_in.has_value() ? new_tensor(*base_scale, {dims.num_rows}) : none();

  const Rows grad = contiguous_rows(grad_in);
  ScatterBackward args{};
  args.dtype = grad_in.scalar_type();
  args.width = dims.width;
  args.grad = grad.data;
  args.grad_stride = grad.stride;
  args.gate = row_scale(gate);
  args.base_scale = row_scale(base_scale);
  std::optional<Rows> base, updates;
  if (base_in.has_value()) {
    base = contiguous_rows(*base_in);
    args.base = base->data;
    args.base_stride = base->stride;
    args.grad_base_scale = grad_base_scale.mutable_data_ptr();
  }
  if (updates_in.has_value()) {
    updates = contiguous_rows(*updates_in);
    args.updates = updates->data;
    args.updates_stride = updates->stride;
    args.grad_gate = grad_gate.mutable_data_ptr();
  }
  if (need_base) args.grad_base = grad_base.mutable_data_ptr();
  if (need_updates) args.grad_updates = grad_updates.mutable_data_ptr();

  const int64_t* index = rows.const_data_ptr<int64_t>();
  const int64_t bytes = dims.width * grad_in.element_size(), grain = rows_per_task(bytes);
  args.stream = (!need_base || streams(args.grad_base, dims.num_rows, bytes)) &&
                (!need_updates || streams(args.grad_updates, dims.num_updates, bytes));
  if (need_base || base_in.has_value()) {
    const RowEntries entries = sort_entries(index, dims.num_updates, dims.num_rows, op);
    args.entries = &entries;
    const auto backward = MOR_BEST(scatter_backward_rows);
    torch::stable::parallel_for(0, dims.num_rows, grain,
                                [&](int64_t begin, int64_t end) { backward(args, begin, end); });
  } else if (need_updates || updates_in.has_value()) {  // any order will do: no sort
    check_row_range(index, dims.num_updates, dims.num_rows, op);
    const RowEntries entries{index, nullptr, dims.num_updates, nullptr};
    args.entries = &entries;
    const auto backward = MOR_BEST(scatter_backward_entries);
    torch::stable::parallel_for(0, dims.num_updates, grain,
                                [&](int64_t begin, int64_t end) { backward(args, begin, end); });
  }
  return {grad_base, grad_updates, grad_gate, grad_base_scale};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("scatter_tokens", TORCH_BOX(&mor::scatter_tokens_cpu));
  m.impl("scatter_tokens_", TORCH_BOX(&mor::scatter_tokens_in_place_cpu));
  m.impl("scatter_tokens_backward", TORCH_BOX(&mor::scatter_tokens_backward_cpu));
}
