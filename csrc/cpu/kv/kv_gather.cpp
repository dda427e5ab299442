#include "csrc/ops/kv_gather.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "csrc/cpu/memory/output_cache.h"
#include "csrc/cpu/rows/gather_tokens.simd.h"
#include "csrc/cpu/rows/row_sums.h"
#include "csrc/tensors.h"

namespace mor {
namespace {

// Writes cu_seqlens and checks the values; returns nothing that could be wrong.
void fill_cu_seqlens(const KvGatherDims& dims, const int32_t* table, const int32_t* lens,
                     int32_t* cu) {
  const int64_t room = dims.max_blocks * dims.cache.block_size;
  int64_t total = 0;
  cu[0] = 0;
  for (int64_t b = 0; b < dims.num_entries; ++b) {
    MOR_CHECK(lens[b] >= 0 && lens[b] <= room, "kv_gather: expected seq_lens in [0, ", room,
              "] (max_blocks * block_size), got seq_lens[", b, "] = ", lens[b]);
    const int64_t used = (lens[b] + dims.cache.block_size - 1) / dims.cache.block_size;
    check_blocks(table + b * dims.max_blocks, b, 0, used, dims.cache.num_blocks, "kv_gather");
    total += lens[b];
    cu[b + 1] = static_cast<int32_t>(std::min<int64_t>(total, INT32_MAX));
  }
  MOR_CHECK(total == dims.num_rows, "kv_gather: expected num_rows of ", total,
            " (the sum of seq_lens), got ", dims.num_rows);
}

// The rows of one cache, in pieces that are contiguous there: a block's rows, a row, or the row of
// one head. The kernel of gather_tokens takes those of one length at byte offsets.
Tensor gather(const Tensor& cache, const KvGatherDims& dims, const int32_t* table,
              const int32_t* cu) {
  const int64_t heads = dims.cache.num_kv_heads, block_size = dims.cache.block_size;
  Tensor out = new_result(cache, {dims.num_rows, heads, dims.cache.head_dim});
  const int64_t item = cache.element_size(), head_bytes = dims.cache.head_dim * item;
  const int64_t row_bytes = heads * head_bytes;
  if (row_bytes == 0) return out;
  const bool whole_rows = heads == 1 || cache.stride(2) == dims.cache.head_dim;
  const bool whole_blocks = whole_rows && cache.stride(1) * item == row_bytes;
  const auto* in = static_cast<const char*>(cache.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto copy = MOR_BEST(copy_rows);
  const bool stream = whole_rows ? streams(to, dims.num_rows, row_bytes)
                                 : streams(to, dims.num_rows * heads, head_bytes);
  const auto gather_rows = [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offsets;  // of pieces not yet copied
    int64_t bytes = 0;             // of each
    char* result = to + begin * row_bytes;
    const auto copy_pieces = [&] {
      const auto count = static_cast<int64_t>(offsets.size());
      copy(in, 1, offsets.data(), result, bytes, count, stream);
      result += count * bytes;
      offsets.clear();
    };
    const auto add_piece = [&](int64_t element, int64_t length) {
      if (length != bytes) copy_pieces();
      bytes = length;
      offsets.push_back(element * item);
    };
    int64_t entry = std::upper_bound(cu, cu + dims.num_entries, begin) - cu - 1;
    for (int64_t row = begin; row < end;) {
      while (cu[entry + 1] <= row) ++entry;
      const int64_t at = row - cu[entry], in_block = at % block_size;
      const int64_t block = table[entry * dims.max_blocks + at / block_size];
      const int64_t first = block * cache.stride(0) + in_block * cache.stride(1);
      const int64_t left = std::min<int64_t>(end, cu[entry + 1]) - row;
      const int64_t run = whole_blocks ? std::min(left, block_size - in_block) : 1;
      if (whole_rows) {
        add_piece(first, run * row_bytes);
      } else {
        for (int64_t h = 0; h < heads; ++h) add_piece(first + h * cache.stride(2), head_bytes);
      }
      row += run;
    }
    copy_pieces();
  };
  torch::stable::parallel_for(0, dims.num_rows, rows_per_task(row_bytes), gather_rows);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> kv_gather_cpu(const Tensor& k_cache, const Tensor& v_cache,
                                                 const Tensor& block_table_in,
                                                 const Tensor& seq_lens_in, int64_t num_rows) {
  const auto dims = check_kv_gather(k_cache, v_cache, block_table_in, seq_lens_in, num_rows);
  const Tensor block_table = as_contiguous(block_table_in);
  const Tensor seq_lens = as_contiguous(seq_lens_in);
  Tensor cu_seqlens = new_tensor(seq_lens, {dims.num_entries + 1});
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  int32_t* cu = cu_seqlens.mutable_data_ptr<int32_t>();
  fill_cu_seqlens(dims, table, seq_lens.const_data_ptr<int32_t>(), cu);
  return {gather(k_cache, dims, table, cu), gather(v_cache, dims, table, cu), cu_seqlens};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) { m.impl("kv_gather", TORCH_BOX(&mor::kv_gather_cpu)); }
