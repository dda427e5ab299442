#include "kv_append.cuh"

#include "../../csrc/ops/kv_append.h"
#include "../../csrc/rows.h"
#include "../glue.h"

namespace mor {
namespace {

KvAppendSide side(const Tensor& cache, const Tensor& rows) {
  const int64_t item = cache.element_size();
  return {static_cast<char*>(cache.mutable_data_ptr()),
          static_cast<const char*>(rows.const_data_ptr()),
          cache.stride(0) * item,
          cache.stride(1) * item,
          cache.stride(2) * item,
          rows.stride(0) * item,
          rows.stride(1) * item};
}

void kv_append_cuda(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in,
                    const Tensor& v_in, const Tensor& slot_mapping_in) {
  const auto dims = check_kv_append(k_cache, v_cache, k_in, v_in, slot_mapping_in);
  const DeviceGuard guard(k_cache.get_device_index());
  const Tensor k = last_contiguous(k_in), v = last_contiguous(v_in);
  const Tensor slot_mapping = as_contiguous(slot_mapping_in);
  const KvAppendArgs args{{side(k_cache, k), side(v_cache, v)},
                          slot_mapping.const_data_ptr<int64_t>(),
                          dims.num_tokens,
                          dims.cache.num_blocks * dims.cache.block_size,
                          dims.cache.block_size,
                          dims.cache.num_kv_heads,
                          dims.cache.head_dim * int64_t(k.element_size()),
                          0};
  check_launch(launch_kv_append(args, current_stream(k_cache)), "kv_append");
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("kv_append", TORCH_BOX(&mor::kv_append_cuda));
}
