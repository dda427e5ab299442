#include "group_rows.cuh"

#include <tuple>

#include "../../csrc/ops/group_rows.h"
#include "../glue.h"

namespace mor {
namespace {

std::tuple<Tensor, Tensor> group_rows_cuda(const Tensor& keys_in, int64_t num_keys,
                                           const std::optional<Tensor>& cu_seqlens_in) {
  const auto dims = check_group_rows(keys_in, num_keys, cu_seqlens_in);
  const DeviceGuard guard(keys_in.get_device_index());
  const Tensor keys = as_contiguous(keys_in);
  const auto cu_seqlens = as_contiguous(cu_seqlens_in);
  const int64_t num_chunks = (dims.num_rows + kGroupChunk - 1) / kGroupChunk;
  Tensor rows = new_tensor(keys, {dims.num_rows}, ScalarType::Long);
  Tensor offsets = new_tensor(keys, {num_keys * dims.num_sequences + 1}, ScalarType::Long);
  Tensor counts = torch::stable::new_zeros(keys, {num_keys * num_chunks + 1}, ScalarType::Long);
  const GroupRowsArgs args{cu_seqlens.has_value() ? cu_seqlens->const_data_ptr<int32_t>() : nullptr,
                           counts.mutable_data_ptr<int64_t>(),
                           rows.mutable_data_ptr<int64_t>(),
                           offsets.mutable_data_ptr<int64_t>(),
                           dims.num_rows,
                           num_keys,
                           dims.num_sequences,
                           num_chunks};
  const auto run = [&]<class Key>(Key) {
    check_launch(launch_group_rows(static_cast<const Key*>(keys.const_data_ptr()), args,
                                   current_stream(keys)),
                 "group_rows");
  };
  switch (keys.scalar_type()) {
    case ScalarType::Long:
      run(int64_t{});
      break;
    case ScalarType::Int:
      run(int32_t{});
      break;
    default:
      run(uint8_t{});
  }
  return {rows, offsets};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("group_rows", TORCH_BOX(&mor::group_rows_cuda));
}
