#include "../ops/group_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace mor {
namespace {

// Rows first .. last - 1, all of one sequence.
struct Chunk {
  int64_t first, last, sequence;
};

template <class Key>
void group(const Key* keys, const GroupRowsDims& dims, const std::vector<Chunk>& chunks,
           int64_t* rows, int64_t* offsets) {
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> counts(num_chunks * dims.num_keys), bad(num_chunks, -1);
  torch::stable::parallel_for(0, num_chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int64_t* count = counts.data() + c * dims.num_keys;
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i) {
        const auto key = static_cast<int64_t>(keys[i]);
        if (key >= 0 && key < dims.num_keys) ++count[key];
        else if (bad[c] < 0) bad[c] = i;
      }
    }
  });
  for (const int64_t row : bad) {
    STD_TORCH_CHECK(row < 0, "group_rows: expected keys in [0, ", dims.num_keys, "), got keys[",
                    row, "] = ", static_cast<int64_t>(keys[row]));
  }
  int64_t start = 0;
  for (int64_t key = 0; key < dims.num_keys; ++key) {
    int64_t c = 0;
    for (int64_t b = 0; b < dims.num_sequences; ++b) {
      offsets[key * dims.num_sequences + b] = start;
      for (; c < num_chunks && chunks[c].sequence == b; ++c)
        start += std::exchange(counts[c * dims.num_keys + key], start);
    }
  }
  offsets[dims.num_keys * dims.num_sequences] = start;
  torch::stable::parallel_for(0, num_chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      int64_t* next = counts.data() + c * dims.num_keys;
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i)
        rows[next[static_cast<int64_t>(keys[i])]++] = i;
    }
  });
}

std::tuple<Tensor, Tensor> group_rows_cpu(const Tensor& keys_in, int64_t num_keys,
                                          const std::optional<Tensor>& cu_seqlens_in) {
  const auto dims = check_group_rows(keys_in, num_keys, cu_seqlens_in);
  const Tensor keys = torch::stable::contiguous(keys_in);
  // At least num_keys rows a chunk: the counts of all chunks then take O(N + outputs) memory.
  const int64_t chunk_rows = std::max<int64_t>(4096, num_keys);
  std::vector<Chunk> chunks;
  const auto add_chunks = [&](int64_t begin, int64_t end, int64_t sequence) {
    for (int64_t first = begin; first < end; first += chunk_rows)
      chunks.push_back({first, std::min(first + chunk_rows, end), sequence});
  };
  if (cu_seqlens_in.has_value()) {
    const Tensor cu_seqlens = torch::stable::contiguous(*cu_seqlens_in);
    check_cu_seqlens_values(cu_seqlens, dims.num_rows, "group_rows", "cu_seqlens");
    const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
    for (int64_t b = 0; b < dims.num_sequences; ++b) add_chunks(cu[b], cu[b + 1], b);
  } else {
    add_chunks(0, dims.num_rows, 0);
  }
  Tensor rows = torch::stable::new_empty(keys, {dims.num_rows}, ScalarType::Long);
  Tensor offsets =
      torch::stable::new_empty(keys, {dims.num_keys * dims.num_sequences + 1}, ScalarType::Long);
  const auto run = [&]<class Key>(Key) {
    group(static_cast<const Key*>(keys.const_data_ptr()), dims, chunks,
          rows.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>());
  };
  switch (keys.scalar_type()) {
    case ScalarType::Long:
      run(int64_t{});
      break;
    case ScalarType::Int:
      run(int32_t{});
      break;
    default:
      run(uint8_t{});
  }
  return {rows, offsets};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) { m.impl("group_rows", TORCH_BOX(&mor::group_rows_cpu)); }
