// kv_append: writes the keys and values of new tokens into their slots of a paged cache, in place.
//   k_cache, v_cache  [num_blocks, block_size, Hkv, head_dim]: float32, bfloat16, float16 or
//                     float64; any strides with a contiguous last dim (a slice of a larger pool)
//   k, v              [N, Hkv, head_dim] as the caches, any strides, sharing no memory with them
//   slot_mapping      [N] int64: block * block_size + offset; negative: the token is skipped
// Slot s of a cache becomes row i with slot_mapping[i] == s, the last such i if there are several,
// on every device and for any number of threads. The cost is that of the N rows, whatever the
// cache holds. A slot past the cache is an error on the CPU, before anything is written, and
// skipped on CUDA. Not differentiable. MoR paper, section 2.2.2: in recursion-wise caching only
// the tokens active in a recursion are given a slot of it.
#pragma once

#include <cstdint>

#include "../operands.h"

namespace mor {

struct KvCacheDims {
  int64_t num_blocks;
  int64_t block_size;
  int64_t num_kv_heads;  // Hkv
  int64_t head_dim;
};

inline std::string strides_str(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.stride(d));
  return text + "]";
}

// The two caches, for every operator that has them.
inline constexpr Operand kKCache{"k_cache", "[num_blocks, block_size, Hkv, head_dim]", "floating"};
inline constexpr Operand kVCache{"v_cache", kKCache.shape, "same",
                                 "v_cache of the shape of k_cache {k_cache}"};

inline KvCacheDims check_kv_cache(const Tensor& k_cache, const Tensor& v_cache, const char* op) {
  const KvCacheDims dims{k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)};
  MOR_CHECK(dims.block_size >= 1, op, ": expected a block_size of at least 1, got ",
            shape_str(k_cache));
  const auto check_rows = [&](const Tensor& t, const char* name) {
    MOR_CHECK(t.size(3) <= 1 || t.stride(3) == 1, op, ": expected ", name,
              " with a contiguous head_dim, got strides ", strides_str(t));
  };
  check_rows(k_cache, "k_cache");
  check_rows(v_cache, "v_cache");
  return dims;
}

struct KvAppendDims {
  int64_t num_tokens;  // N
  KvCacheDims cache;
};

inline constexpr Operands kKvAppendOperands{"kv_append",
                                            {kKCache,
                                             kVCache,
                                             {"slot_mapping", "[N]", "int64"},
                                             {"k", "[N, Hkv, head_dim]", "same"},
                                             {"v", "[N, Hkv, head_dim]", "same"}}};

inline KvAppendDims check_kv_append(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                                    const Tensor& v, const Tensor& slot_mapping) {
  const char* op = "kv_append";
  kKvAppendOperands.check({&k_cache, &v_cache, &slot_mapping, &k, &v});
  const KvCacheDims cache = check_kv_cache(k_cache, v_cache, op);
  const auto check_written = [&](const Tensor& t, const char* name) {
    bool shared = false;
    for (int64_t d = 0; d < 4; ++d) shared |= t.size(d) > 1 && t.stride(d) == 0;
    MOR_CHECK(!shared, op, ": expected ", name, " whose elements do not share memory, got strides ",
              strides_str(t));
  };
  check_written(k_cache, "k_cache");
  check_written(v_cache, "v_cache");
  return {slot_mapping.size(0), cache};
}

}  // namespace mor
