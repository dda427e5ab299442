// paged_depth_attention: attention of packed queries over entries of a paged key/value cache.
//   q                 [N, H, head_dim]: as the caches; any strides with a contiguous last dim
//   k_cache, v_cache  [num_blocks, block_size, Hkv, head_dim], as in kv_append.h; H is a multiple
//                     of Hkv: query head h reads key head h / (H / Hkv)
//   block_table       [B, max_blocks] int32, as in kv_gather.h; entries may share blocks
//   context_lens      [N] int32: query i sees the first context_lens[i] keys of its entry, in cache
//                     order, at most max_blocks * block_size; non-decreasing inside an entry
//   cu_seqlens_q      [B + 1] int32: entry b has queries cu[b] .. cu[b + 1] - 1, perhaps none
//   context_starts    [N] int32, optional: of these, those from context_starts[i] on (a window);
//                     non-decreasing inside an entry
// An entry is one (sequence, recursion or layer) pair, so that rows at different recursion depths
// are served by one call. Decoding has one query an entry, that sees all its keys; prefill in
// chunks a growing bound; recursive KV sharing the position + 1.
//   out               [N, H, head_dim]: softmax over the visible keys of scale * <q_i, k_j>,
//                     applied to v; 0 for a query that sees no key
//   softmax_lse       [H, N] float32 (float64 for float64): log of the sum of exponentials; -inf
//                     for a query that sees no key
// Sums run in float32 (float64 for float64). Only blocks that some query sees are looked at: block
// numbers elsewhere may be anything. Long entries are split at places that follow from sizes alone,
// on the CPU from those of the entry itself, and merged in a fixed order: the result is the same
// for any number of threads and, on the CPU, for any other entries beside it. Not differentiable.
// Values checked on the CPU only (on CUDA undefined): cu_seqlens_q grows from 0 to N, 0 <=
// context_starts <= context_lens, neither decreases inside an entry, block numbers in
// [0, num_blocks). MoR paper, section 2.2.2 (recursion-wise caching, recursive sharing).
#pragma once

#include <optional>

#include "kv_gather.h"

namespace mor {

struct PagedDepthAttentionDims {
  KvCacheDims cache;
  int64_t num_queries;  // N
  int64_t num_entries;  // B
  int64_t max_blocks;
  int64_t num_heads;  // H
};

inline constexpr Operands kPagedDepthAttentionOperands{
    "paged_depth_attention",
    {kKCache,
     kVCache,
     {"q", "[N, H, head_dim]", "same", "q with head_dim {k_cache[3]}"},
     kBlockTable,
     {"context_lens", "[N]", "int32"},
     {"cu_seqlens_q", "[B + 1]", "int32"},
     {"context_starts", "[N]", "int32"}}};

inline PagedDepthAttentionDims check_paged_depth_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
    const Tensor& context_lens, const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& context_starts) {
  const char* op = "paged_depth_attention";
  check_head_dim(k_cache, 4, op);
  kPagedDepthAttentionOperands.check({&k_cache, &v_cache, &q, &block_table, &context_lens,
                                      &cu_seqlens_q, pointer(context_starts)});
  const KvCacheDims cache = check_kv_cache(k_cache, v_cache, op);
  MOR_CHECK(cache.num_kv_heads > 0 && q.size(1) % cache.num_kv_heads == 0, op, ": expected the ",
            q.size(1), " heads of q to be a multiple of those of k_cache, got ",
            cache.num_kv_heads);
  return {cache, q.size(0), block_table.size(0), block_table.size(1), q.size(1)};
}

}  // namespace mor
