#include "../../../kernels/kv/kv_append.cuh"

#include "binding.h"

// strides: block, offset and head of the cache, row and head of the rows, for k, then for v; bytes.
SIMT_EXPORT int kv_append(void* k_cache, void* v_cache, const void* k, const void* v,
                          const int64_t* slots, const int64_t* strides, int64_t num_tokens,
                          int64_t num_slots, int64_t block_size, int64_t num_heads,
                          int64_t head_bytes) {
  const auto side = [](void* cache, const void* rows, const int64_t* s) {
    return mor::KvAppendSide{
        static_cast<char*>(cache), static_cast<const char*>(rows), s[0], s[1], s[2], s[3], s[4]};
  };
  const mor::KvAppendArgs args{{side(k_cache, k, strides), side(v_cache, v, strides + 5)},
                               slots,
                               num_tokens,
                               num_slots,
                               block_size,
                               num_heads,
                               head_bytes,
                               0};
  return simt::guarded([&] { return mor::launch_kv_append(args, nullptr); });
}
