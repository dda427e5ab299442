#include "../ops/gather_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

namespace mor {
namespace {

Tensor gather_tokens_cpu(const Tensor& x_in, const Tensor& rows_in) {
  const auto dims = check_gather_tokens(x_in, rows_in);
  const Tensor x =
      x_in.size(1) == 1 || x_in.stride(1) == 1 ? x_in : torch::stable::contiguous(x_in);
  const Tensor rows = torch::stable::contiguous(rows_in);
  Tensor y = torch::stable::new_empty(x, {dims.num_taken, dims.width});
  const int64_t* index = rows.const_data_ptr<int64_t>();
  const int64_t bytes = dims.width * x.element_size(), stride = x.stride(0) * x.element_size();
  const char* in = static_cast<const char*>(x.const_data_ptr());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  for (int64_t i = 0; i < dims.num_taken; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < dims.num_rows,
                    "gather_tokens: expected rows in [0, ", dims.num_rows, "), got rows[", i,
                    "] = ", index[i]);
  }
  torch::stable::parallel_for(0, dims.num_taken, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(out + i * bytes, in + index[i] * stride, bytes);
  });
  return y;
}

Tensor gather_tokens_backward_cpu(const Tensor& grad_in, const Tensor& rows_in, int64_t num_rows) {
  const auto dims = check_gather_tokens_backward(grad_in, rows_in, num_rows);
  const Tensor grad = torch::stable::contiguous(grad_in), rows = torch::stable::contiguous(rows_in);
  Tensor grad_x = torch::stable::new_zeros(grad, {dims.num_rows, dims.width});
  const int64_t* index = rows.const_data_ptr<int64_t>();
  dispatch_floating(grad.scalar_type(), [&]<class T>(T) {
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    std::vector<Acc> sum(dims.num_rows * dims.width, Acc{0});
    const T* in = grad.const_data_ptr<T>();
    for (int64_t i = 0; i < dims.num_taken; ++i) {
      for (int64_t d = 0; d < dims.width; ++d)
        sum[index[i] * dims.width + d] += static_cast<Acc>(in[i * dims.width + d]);
    }
    T* out = grad_x.mutable_data_ptr<T>();
    for (size_t e = 0; e < sum.size(); ++e) out[e] = static_cast<T>(sum[e]);
  });
  return grad_x;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&mor::gather_tokens_cpu));
  m.impl("gather_tokens_backward", TORCH_BOX(&mor::gather_tokens_backward_cpu));
}
