#include "csrc/ops/kv_append.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "csrc/rows.h"

namespace mor {
namespace {

// Waking a thread costs as much as copying about this.
constexpr int64_t kBytesPerTask = int64_t{64} << 10;

// Head rows of one cache and of what goes into it; strides in bytes.
struct Side {
  char* cache;
  const char* rows;
  int64_t block_stride, offset_stride, cache_head_stride, row_stride, head_stride;
};

Side side(const Tensor& cache, const Tensor& rows) {
  const int64_t item = cache.element_size();
  return {static_cast<char*>(cache.mutable_data_ptr()),
          static_cast<const char*>(rows.const_data_ptr()),
          cache.stride(0) * item,
          cache.stride(1) * item,
          cache.stride(2) * item,
          rows.stride(0) * item,
          rows.stride(1) * item};
}

// Heads [begin, end) of all tokens, in their order: of two with one slot the last stays.
void append_heads(const Side& s, const int64_t* slots, const KvAppendDims& dims, int64_t bytes,
                  int64_t begin, int64_t end) {
  const int64_t block_size = dims.cache.block_size;
  const bool joined = s.cache_head_stride == bytes && s.head_stride == bytes;
  for (int64_t i = 0; i < dims.num_tokens; ++i) {
    if (slots[i] < 0) continue;
    char* to = s.cache + slots[i] / block_size * s.block_stride +
               slots[i] % block_size * s.offset_stride + begin * s.cache_head_stride;
    const char* from = s.rows + i * s.row_stride + begin * s.head_stride;
    if (joined) {
      std::memcpy(to, from, (end - begin) * bytes);
    } else {
      for (int64_t h = begin; h < end; ++h, to += s.cache_head_stride, from += s.head_stride)
        std::memcpy(to, from, bytes);
    }
  }
}

void kv_append_cpu(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_in,
                   const Tensor& v_in, const Tensor& slot_mapping_in) {
  const auto dims = check_kv_append(k_cache, v_cache, k_in, v_in, slot_mapping_in);
  const Tensor slot_mapping = as_contiguous(slot_mapping_in);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const int64_t num_slots = dims.cache.num_blocks * dims.cache.block_size;
  for (int64_t i = 0; i < dims.num_tokens; ++i) {
    MOR_CHECK(slots[i] < num_slots, "kv_append: expected slot_mapping below ", num_slots,
              " (num_blocks * block_size), got slot_mapping[", i, "] = ", slots[i]);
  }
  const Tensor k = last_contiguous(k_in), v = last_contiguous(v_in);
  const int64_t heads = dims.cache.num_kv_heads, bytes = dims.cache.head_dim * k.element_size();
  if (bytes == 0 || dims.num_tokens == 0) return;
  const Side sides[] = {side(k_cache, k), side(v_cache, v)};
  const int64_t grain = std::max<int64_t>(kBytesPerTask / (dims.num_tokens * bytes), 1);
  torch::stable::parallel_for(0, 2 * heads, grain, [&](int64_t begin, int64_t end) {
    if (begin < heads) append_heads(sides[0], slots, dims, bytes, begin, std::min(end, heads));
    if (end > heads)
      append_heads(sides[1], slots, dims, bytes, std::max(begin - heads, int64_t{0}), end - heads);
  });
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) { m.impl("kv_append", TORCH_BOX(&mor::kv_append_cpu)); }
