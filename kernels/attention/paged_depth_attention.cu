#include "paged_depth_attention.cuh"

#include <optional>
#include <tuple>

#include "../../csrc/ops/paged_depth_attention.h"
#include "../../csrc/rows.h"
#include "../glue.h"

namespace mor {
namespace {

using std::optional;

// Whether 16-byte accesses of the rows are possible; the last dimension is contiguous.
bool is_aligned(const Tensor& t) {
  const int64_t size = t.element_size(), last = t.dim() - 1;
  uintptr_t bits = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  for (int64_t d = 0; d < last; ++d) bits |= uintptr_t(t.stride(d) * size);
  return (bits | uintptr_t(t.size(last) * size)) % 16 == 0;
}

template <class T>
PagedCache<T> paged_cache(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

std::tuple<Tensor, Tensor> paged_depth_attention_cuda(
    const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table_in,
    const Tensor& context_lens_in, const Tensor& cu_seqlens_q_in,
    const optional<Tensor>& context_starts_in, double scale) {
  const auto dims = check_paged_depth_attention(
      q_in, k_cache, v_cache, block_table_in, context_lens_in, cu_seqlens_q_in, context_starts_in);
  const DeviceGuard guard(q_in.get_device_index());
  const Tensor q = last_contiguous(q_in);
  const Tensor block_table = as_contiguous(block_table_in);
  const Tensor context_lens = as_contiguous(context_lens_in);
  const Tensor cu_seqlens_q = as_contiguous(cu_seqlens_q_in);
  const auto context_starts = as_contiguous(context_starts_in);
  const ScalarType acc =
      q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = dims.num_queries * dims.num_heads;
  Tensor out = new_tensor(q, {dims.num_queries, dims.num_heads, dims.cache.head_dim});
  Tensor lse = new_tensor(q, {dims.num_heads, dims.num_queries}, acc);
  if (rows == 0 || dims.num_entries == 0) return {out, lse};
  const int splits =
      paged_splits(dims.num_queries, int(dims.num_entries), int(dims.num_heads),
                   int(dims.cache.num_kv_heads), dims.max_blocks * dims.cache.block_size);
  const int64_t kept = splits > 1 ? splits * rows : 0;
  Tensor parts = new_tensor(q, {kept, dims.cache.head_dim}, acc);
  Tensor totals = new_tensor(q, {kept, 2}, acc);
  dispatch_floating_cuda(q.scalar_type(), [&]<class T>(T) {
    PagedDepthAttention<T> p{};
    p.q = {static_cast<const T*>(q.const_data_ptr()), q.stride(0), q.stride(1)};
    p.k = paged_cache<T>(k_cache), p.v = paged_cache<T>(v_cache);
    p.block_table = block_table.const_data_ptr<int32_t>();
    p.context_lens = context_lens.const_data_ptr<int32_t>();
    p.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
    if (context_starts.has_value()) p.context_starts = context_starts->const_data_ptr<int32_t>();
    p.num_queries = dims.num_queries, p.max_blocks = dims.max_blocks;
    p.block_size = dims.cache.block_size, p.num_entries = int(dims.num_entries);
    p.num_heads = int(dims.num_heads), p.num_kv_heads = int(dims.cache.num_kv_heads);
    p.head_dim = int(dims.cache.head_dim), p.scale = acc_t<T>(scale);
    p.aligned = is_aligned(q) && is_aligned(k_cache) && is_aligned(v_cache);
    p.num_splits = splits;
    p.out = static_cast<T*>(out.mutable_data_ptr());
    p.lse = static_cast<acc_t<T>*>(lse.mutable_data_ptr());
    p.parts = static_cast<acc_t<T>*>(parts.mutable_data_ptr());
    p.totals = static_cast<acc_t<T>*>(totals.mutable_data_ptr());
    check_launch(launch_paged_depth_attention(p, current_stream(q)), "paged_depth_attention");
  });
  return {out, lse};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("paged_depth_attention", TORCH_BOX(&mor::paged_depth_attention_cuda));
}
