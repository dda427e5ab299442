#include "csrc/ops/packed_linear.h"

#include <torch/csrc/stable/library.h>

#include "csrc/cpu/memory/arena.h"
#include "csrc/cpu/memory/output_cache.h"
#include "csrc/cpu/products/packed_linear.simd.h"
#include "csrc/rows.h"

namespace mor {
namespace {

// Panels for one task: tens of microseconds of reading or multiplying.
int64_t panels_per_task(const PackedLinearDims& dims) {
  const int64_t work = dims.num_inputs * kPanel * std::max<int64_t>(dims.num_rows, 4);
  return std::max<int64_t>((int64_t{1} << 18) / std::max<int64_t>(work, 1), 1);
}

Tensor packed_linear_cpu(const Tensor& x_in, const Tensor& packed_in, int64_t num_outputs,
                         const std::optional<Tensor>& bias_in) {
  const auto dims = check_packed_linear(x_in, packed_in, num_outputs, bias_in);
  Tensor y = new_result(x_in, {dims.num_rows, num_outputs});
  const Rows x = contiguous_rows(x_in);
  const Tensor packed = as_contiguous(packed_in);
  const Tensor bias = bias_in.has_value() ? as_contiguous(*bias_in) : x_in;
  PackedLinear args{};
  args.dims = dims;
  args.halves = x_in.scalar_type() == ScalarType::BFloat16;
  args.packed = packed.const_data_ptr();
  args.bias = bias_in.has_value() ? bias.const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.x = static_cast<const float*>(x.data);
  args.x_stride = x.stride;
  Scratch widened;
  if (args.halves) {
    const int64_t stride = (dims.num_inputs + 1) / 2 * 2;
    widened = allocate(dims.num_rows * stride * 4);
    auto* rows = reinterpret_cast<float*>(widened.get());
    const auto* in = static_cast<const torch::headeronly::BFloat16*>(x.data);
    const auto widen = MOR_BEST(widen_row);
    for (int64_t row = 0; row < dims.num_rows; ++row) {
      widen(in + row * x.stride, dims.num_inputs, rows + row * stride);
      if (stride > dims.num_inputs) rows[row * stride + dims.num_inputs] = 0;
    }
    args.x = rows;
    args.x_stride = stride;
  }
  const auto run = MOR_BEST(packed_linear_panels);
  torch::stable::parallel_for(0, (num_outputs + kPanel - 1) / kPanel, panels_per_task(dims),
                              [&](int64_t begin, int64_t end) { run(args, begin, end); });
  return y;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&mor::packed_linear_cpu));
}
