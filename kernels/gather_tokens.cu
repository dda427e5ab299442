#include "gather_tokens.cuh"

#include "../csrc/ops/gather_tokens.h"
#include "glue.h"

namespace mor {
namespace {

Tensor gather_tokens_cuda(const Tensor& x_in, const Tensor& rows_in) {
  const auto dims = check_gather_tokens(x_in, rows_in);
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x =
      x_in.size(1) == 1 || x_in.stride(1) == 1 ? x_in : torch::stable::contiguous(x_in);
  const Tensor rows = torch::stable::contiguous(rows_in);
  Tensor y = torch::stable::new_empty(x, {dims.num_taken, dims.width});
  check_launch(
      launch_gather_tokens(x.const_data_ptr(), rows.const_data_ptr<int64_t>(), y.mutable_data_ptr(),
                           dims.num_taken, x.stride(0) * x.element_size(),
                           dims.width * x.element_size(), current_stream(x)),
      "gather_tokens");
  return y;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CUDA, m) {
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens_cuda));
}
