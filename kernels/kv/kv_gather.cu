#include "kv_gather.cuh"

#include <tuple>

#include "../../csrc/ops/kv_gather.h"
#include "../glue.h"

namespace mor {
namespace {

KvGatherSide side(const Tensor& cache, Tensor& out) {
  const int64_t item = cache.element_size();
  return {static_cast<const char*>(cache.const_data_ptr()),
          static_cast<char*>(out.mutable_data_ptr()), cache.stride(0) * item,
          cache.stride(1) * item, cache.stride(2) * item};
}

std::tuple<Tensor, Tensor, Tensor> kv_gather_cuda(const Tensor& k_cache, const Tensor& v_cache,
                                                  const Tensor& block_table_in,
                                                  const Tensor& seq_lens_in, int64_t num_rows) {
  const auto dims = check_kv_gather(k_cache, v_cache, block_table_in, seq_lens_in, num_rows);
  const DeviceGuard guard(k_cache.get_device_index());
  const Tensor block_table = as_contiguous(block_table_in);
  const Tensor seq_lens = as_contiguous(seq_lens_in);
  const auto rows = [&](const Tensor& cache) {
    return new_tensor(cache, {num_rows, dims.cache.num_kv_heads, dims.cache.head_dim});
  };
  Tensor k = rows(k_cache), v = rows(v_cache);
  Tensor cu_seqlens = new_tensor(seq_lens, {dims.num_entries + 1});
  const KvGatherArgs args{{side(k_cache, k), side(v_cache, v)},
                          block_table.const_data_ptr<int32_t>(),
                          seq_lens.const_data_ptr<int32_t>(),
                          cu_seqlens.mutable_data_ptr<int32_t>(),
                          dims.num_entries,
                          dims.max_blocks,
                          dims.cache.block_size,
                          num_rows,
                          dims.cache.num_kv_heads,
                          dims.cache.head_dim * int64_t(k.element_size())};
  check_launch(launch_kv_gather(args, current_stream(k_cache)), "kv_gather");
  return {k, v, cu_seqlens};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("kv_gather", TORCH_BOX(&mor::kv_gather_cuda));
}
