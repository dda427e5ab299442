#include "csrc/ops/gather_tokens.h"

#include <torch/csrc/stable/library.h>

#include "csrc/cpu/memory/output_cache.h"
#include "csrc/cpu/rows/gather_tokens.simd.h"
#include "csrc/cpu/rows/row_sums.simd.h"

namespace mor {
namespace {

Tensor gather_tokens_cpu(const Tensor& x_in, const Tensor& rows_in) {
  const auto dims = check_gather_tokens(x_in, rows_in);
  const Rows x = contiguous_rows(x_in);
  const Tensor rows = as_contiguous(rows_in);
  const int64_t* index = rows.const_data_ptr<int64_t>();
  check_row_range(index, dims.num_taken, dims.num_rows, "gather_tokens");
  Tensor y = new_result(x_in, {dims.num_taken, dims.width});
  const int64_t item = x_in.element_size(), bytes = dims.width * item;
  const auto* in = static_cast<const char*>(x.data);
  auto* out = static_cast<char*>(y.mutable_data_ptr());
  const auto copy = MOR_BEST(copy_rows);
  const bool stream = streams(out, dims.num_taken, bytes);
  torch::stable::parallel_for(
      0, dims.num_taken, rows_per_task(bytes), [&](int64_t begin, int64_t end) {
        copy(in, x.stride * item, index + begin, out + begin * bytes, bytes, end - begin, stream);
      });
  return y;
}

Tensor gather_tokens_backward_cpu(const Tensor& grad_in, const Tensor& rows_in, int64_t num_rows) {
  const auto dims = check_gather_tokens_backward(grad_in, rows_in, num_rows);
  const Rows grad = contiguous_rows(grad_in);
  const Tensor rows = as_contiguous(rows_in);
  const RowEntries entries = sort_entries(rows.const_data_ptr<int64_t>(), dims.num_taken,
                                          dims.num_rows, "gather_tokens_backward");
  Tensor grad_x = new_result(grad_in, {dims.num_rows, dims.width});
  const int64_t bytes = dims.width * grad_in.element_size();
  RowSums sums{};
  sums.dtype = grad_in.scalar_type();
  sums.width = dims.width;
  sums.out = grad_x.mutable_data_ptr();
  sums.out_stride = dims.width;
  sums.updates = grad.data;
  sums.updates_stride = grad.stride;
  sums.entries = &entries;
  sums.stream = streams(sums.out, dims.num_rows, bytes);
  const auto sum = MOR_BEST(sum_rows);
  torch::stable::parallel_for(0, dims.num_rows, rows_per_task(bytes),
                              [&](int64_t begin, int64_t end) { sum(sums, begin, end); });
  return grad_x;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens_cpu));
  m.impl("gather_tokens_backward", TORCH_BOX(&mor::gather_tokens_backward_cpu));
}
