#include "../../../kernels/attention/paged_depth_attention.cuh"

#include "binding.h"

namespace {

// Filled by test_simt_paged_depth_attention.py; the pointers are of the dtype, or of float or
// double.
struct Arguments {
  const void *q, *k_cache, *v_cache, *block_table, *context_lens, *cu_seqlens_q, *context_starts;
  void *out, *lse, *parts, *totals;
  int64_t strides[8];  // row and head of q; block, row and head of k_cache and v_cache
  int64_t num_queries, num_entries, max_blocks, block_size, num_heads, num_kv_heads, head_dim,
      aligned, num_splits;
  double scale;
};

template <class T>
mor::PagedDepthAttention<T> typed(const Arguments& a) {
  const auto cache = [](const void* data, const int64_t* s) {
    return mor::PagedCache<T>{static_cast<const T*>(data), s[0], s[1], s[2]};
  };
  mor::PagedDepthAttention<T> p{};
  p.q = {static_cast<const T*>(a.q), a.strides[0], a.strides[1]};
  p.k = cache(a.k_cache, a.strides + 2), p.v = cache(a.v_cache, a.strides + 5);
  p.block_table = static_cast<const int32_t*>(a.block_table);
  p.context_lens = static_cast<const int32_t*>(a.context_lens);
  p.cu_seqlens_q = static_cast<const int32_t*>(a.cu_seqlens_q);
  p.context_starts = static_cast<const int32_t*>(a.context_starts);
  p.num_queries = a.num_queries, p.max_blocks = a.max_blocks, p.block_size = a.block_size;
  p.num_entries = int(a.num_entries), p.num_heads = int(a.num_heads);
  p.num_kv_heads = int(a.num_kv_heads), p.head_dim = int(a.head_dim);
  p.scale = mor::acc_t<T>(a.scale), p.aligned = a.aligned != 0, p.num_splits = int(a.num_splits);
  p.out = static_cast<T*>(a.out), p.lse = static_cast<mor::acc_t<T>*>(a.lse);
  p.parts = static_cast<mor::acc_t<T>*>(a.parts);
  p.totals = static_cast<mor::acc_t<T>*>(a.totals);
  return p;
}

}  // namespace

SIMT_EXPORT int paged_depth_attention_splits(const Arguments* a, int64_t* splits) {
  return simt::guarded([&] {
    *splits = mor::paged_splits(a->num_queries, int(a->num_entries), int(a->num_heads),
                                int(a->num_kv_heads), a->max_blocks * a->block_size);
    return cudaSuccess;
  });
}

SIMT_EXPORT int paged_depth_attention(int64_t dtype, const Arguments* a) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      return mor::launch_paged_depth_attention(typed<T>(*a), nullptr);
    });
  });
}
