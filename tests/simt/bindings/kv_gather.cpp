#include "../../../kernels/kv/kv_gather.cuh"

#include "binding.h"

// strides: block, offset and head of k_cache, then of v_cache; bytes.
SIMT_EXPORT int kv_gather(const void* k_cache, const void* v_cache, void* k, void* v,
                          const int32_t* block_table, const int32_t* seq_lens, int32_t* cu_seqlens,
                          const int64_t* strides, int64_t num_entries, int64_t max_blocks,
                          int64_t block_size, int64_t num_rows, int64_t num_heads,
                          int64_t head_bytes) {
  const auto side = [](const void* cache, void* out, const int64_t* s) {
    return mor::KvGatherSide{static_cast<const char*>(cache), static_cast<char*>(out), s[0], s[1],
                             s[2]};
  };
  const mor::KvGatherArgs args{{side(k_cache, k, strides), side(v_cache, v, strides + 3)},
                               block_table,
                               seq_lens,
                               cu_seqlens,
                               num_entries,
                               max_blocks,
                               block_size,
                               num_rows,
                               num_heads,
                               head_bytes};
  return simt::guarded([&] { return mor::launch_kv_gather(args, nullptr); });
}
