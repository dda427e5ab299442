#include "gather_tokens.cuh"

#include "../../csrc/ops/gather_tokens.h"
#include "../../csrc/rows.h"
#include "row_sums.h"

namespace mor {
namespace {

Tensor gather_tokens_cuda(const Tensor& x_in, const Tensor& rows_in) {
  const auto dims = check_gather_tokens(x_in, rows_in);
  const DeviceGuard guard(x_in.get_device_index());
  const Rows x = contiguous_rows(x_in);
  const Tensor rows = as_contiguous(rows_in);
  Tensor y = new_tensor(x_in, {dims.num_taken, dims.width});
  const int64_t item = x_in.element_size();
  check_launch(launch_gather_tokens(x.data, rows.const_data_ptr<int64_t>(), y.mutable_data_ptr(),
                                    dims.num_taken, x.stride * item, dims.width * item,
                                    current_stream(x_in)),
               "gather_tokens");
  return y;
}

Tensor gather_tokens_backward_cuda(const Tensor& grad_in, const Tensor& rows_in, int64_t num_rows) {
  const auto dims = check_gather_tokens_backward(grad_in, rows_in, num_rows);
  const DeviceGuard guard(grad_in.get_device_index());
  const Rows grad = contiguous_rows(grad_in);
  const Tensor rows = as_contiguous(rows_in);
  Tensor grad_x = new_tensor(grad_in, {dims.num_rows, dims.width});
  Tensor scratch = range_scratch(rows, dims.num_rows, "gather_tokens_backward");
  dispatch_floating_cuda(grad_in.scalar_type(), [&]<class T>(T) {
    check_launch(launch_gather_tokens_backward(
                     static_cast<const T*>(grad.data), grad.stride, rows.const_data_ptr<int64_t>(),
                     static_cast<T*>(grad_x.mutable_data_ptr()), scratch.mutable_data_ptr<int>(),
                     dims.num_rows, dims.num_taken, dims.width, current_stream(grad_in)),
                 "gather_tokens_backward");
  });
  return grad_x;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens_cuda));
  m.impl("gather_tokens_backward", TORCH_BOX(&mor::gather_tokens_backward_cuda));
}
