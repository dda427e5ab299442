#include "csrc/ops/group_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/cpu/routing/group_rows.simd.h"
#include "csrc/cpu/tuning.h"
#include "csrc/tensors.h"

namespace mor {
namespace {

// Rows first .. last - 1, all of one sequence.
struct Chunk {
  int64_t first, last, sequence;
};

// counts[key] += the rows of a chunk; returns the first row whose key is out of range, or -1.
template <class Key>
int64_t count_chunk(const Key* keys, const Chunk& chunk, int64_t num_keys, int64_t* counts,
                    uint8_t* codes) {
  if (codes) {
    MOR_BEST(group_rows_count)
    (keys + chunk.first, sizeof(Key), chunk.last - chunk.first, num_keys, counts,
     codes + chunk.first);
    const int64_t counted = std::accumulate(counts, counts + num_keys, int64_t{0});
    if (counted == chunk.last - chunk.first) return -1;
  }
  for (int64_t i = chunk.first; i < chunk.last; ++i) {
    const auto key = static_cast<int64_t>(keys[i]);
    if (key < 0 || key >= num_keys) return i;
    ++counts[key];
  }
  return -1;
}

template <class Key>
void write_chunk(const Key* keys, const Chunk& chunk, int64_t num_keys, int64_t* next,
                 const uint8_t* codes, int64_t* rows) {
  if (codes) {
    MOR_BEST(group_rows_write)(codes, chunk.first, chunk.last, num_keys, next, rows);
    return;
  }
  for (int64_t i = chunk.first; i < chunk.last; ++i)
    rows[next[static_cast<int64_t>(keys[i])]++] = i;
}

template <class Key>
void group(const Key* keys, const GroupRowsDims& dims, const std::vector<Chunk>& chunks,
           int64_t* rows, int64_t* offsets) {
  const int64_t num_chunks = static_cast<int64_t>(chunks.size()), num_keys = dims.num_keys;
  std::vector<int64_t> counts(num_chunks * num_keys), bad(num_chunks, -1);
  const std::unique_ptr<uint8_t[]> codes(num_keys <= kMaxMaskedKeys ? new uint8_t[dims.num_rows]
                                                                    : nullptr);
  const int64_t chunk_rows = dims.num_rows / std::max<int64_t>(num_chunks, 1) + 1;
  const int64_t grain = std::max<int64_t>(kRowsPerThread / chunk_rows, 1);
  torch::stable::parallel_for(0, num_chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      bad[c] = count_chunk(keys, chunks[c], num_keys, counts.data() + c * num_keys, codes.get());
  });
  for (const int64_t row : bad) {
    MOR_CHECK(row < 0, "group_rows: expected keys in [0, ", num_keys, "), got keys[", row,
              "] = ", static_cast<int64_t>(keys[row]));
  }
  int64_t start = 0;
  for (int64_t key = 0; key < num_keys; ++key) {
    int64_t c = 0;
    for (int64_t b = 0; b < dims.num_sequences; ++b) {
      offsets[key * dims.num_sequences + b] = start;
      for (; c < num_chunks && chunks[c].sequence == b; ++c)
        start += std::exchange(counts[c * num_keys + key], start);
    }
  }
  offsets[num_keys * dims.num_sequences] = start;
  torch::stable::parallel_for(0, num_chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      write_chunk(keys, chunks[c], num_keys, counts.data() + c * num_keys, codes.get(), rows);
  });
}

std::tuple<Tensor, Tensor> group_rows_cpu(const Tensor& keys_in, int64_t num_keys,
                                          const std::optional<Tensor>& cu_seqlens_in) {
  const auto dims = check_group_rows(keys_in, num_keys, cu_seqlens_in);
  const Tensor keys = as_contiguous(keys_in);
  // At least num_keys rows a chunk: the counts of all chunks then take O(N + outputs) memory.
  const int64_t chunk_rows = std::max<int64_t>(kChunkRows, num_keys);
  std::vector<Chunk> chunks;
  const auto add_chunks = [&](int64_t begin, int64_t end, int64_t sequence) {
    for (int64_t first = begin; first < end; first += chunk_rows)
      chunks.push_back({first, std::min(first + chunk_rows, end), sequence});
  };
  if (cu_seqlens_in.has_value()) {
    const Tensor cu_seqlens = as_contiguous(*cu_seqlens_in);
    check_cu_seqlens_values(cu_seqlens, dims.num_rows, "group_rows", "cu_seqlens");
    const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
    for (int64_t b = 0; b < dims.num_sequences; ++b) add_chunks(cu[b], cu[b + 1], b);
  } else {
    add_chunks(0, dims.num_rows, 0);
  }
  Tensor rows = new_tensor(keys, {dims.num_rows}, ScalarType::Long);
  Tensor offsets = new_tensor(keys, {dims.num_keys * dims.num_sequences + 1}, ScalarType::Long);
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
