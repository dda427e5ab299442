#include "csrc/ops/paged_depth_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "csrc/cpu/attention/paged_depth_attention.simd.h"
#include "csrc/cpu/memory/arena.h"
#include "csrc/cpu/memory/output_cache.h"
#include "csrc/rows.h"

namespace mor {
namespace {

using std::optional;

PagedCache paged_cache(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// The keys that any of some queries of one entry sees; contexts and their starts never fall.
struct KeyRange {
  int64_t begin, end;
};
KeyRange keys_seen(const PagedProblem& p, int64_t first_query, int64_t last_query) {
  return {p.context_starts ? p.context_starts[first_query] : 0, p.context_lens[last_query]};
}

void check_values(const PagedProblem& p, const PagedDepthAttentionDims& dims,
                  const Tensor& cu_seqlens_q) {
  const char* op = "paged_depth_attention";
  check_cu_seqlens_values(cu_seqlens_q, dims.num_queries, op, "cu_seqlens_q");
  const int64_t room = dims.max_blocks * p.block_size;
  const int32_t *lens = p.context_lens, *starts = p.context_starts, *cu = p.queries.cu_q;
  for (int64_t b = 0; b < dims.num_entries; ++b) {
    for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
      MOR_CHECK(lens[i] >= 0 && lens[i] <= room, op, ": expected context_lens in [0, ", room,
                "] (max_blocks * block_size), got context_lens[", i, "] = ", lens[i]);
      MOR_CHECK(!starts || (starts[i] >= 0 && starts[i] <= lens[i]), op,
                ": expected context_starts in [0, context_lens], got context_starts[", i,
                "] = ", starts[i], " with context_lens[", i, "] = ", lens[i]);
      if (i == cu[b]) continue;
      MOR_CHECK(lens[i] >= lens[i - 1], op,
                ": expected context_lens that do not fall inside an entry, got context_lens[", i,
                "] = ", lens[i], " after ", lens[i - 1]);
      MOR_CHECK(!starts || starts[i] >= starts[i - 1], op,
                ": expected context_starts that do not fall inside an entry, got context_starts[",
                i, "] = ", starts[i], " after ", starts[i - 1]);
    }
    if (cu[b] == cu[b + 1]) continue;
    const KeyRange keys = keys_seen(p, cu[b], cu[b + 1] - 1);
    if (keys.begin == keys.end) continue;
    check_blocks(p.block_table + b * p.max_blocks, b, keys.begin / p.block_size,
                 (keys.end + p.block_size - 1) / p.block_size, dims.cache.num_blocks, op);
  }
}

// float64, one row at a time in plain loops.
void scalar_row(const PagedProblem& p, int64_t b, int64_t i, int64_t h,
                std::vector<double>& scores) {
  const DepthAttentionDims& dims = p.queries.dims;
  const int64_t hd = dims.head_dim, g = h / p.queries.group;
  const KeyRange keys = keys_seen(p, i, i);
  const auto row = [&](const PagedCache& cache, int64_t j) {
    const int64_t block = p.block_table[b * p.max_blocks + j / p.block_size];
    return static_cast<const double*>(cache.data) + block * cache.block_stride +
           j % p.block_size * cache.row_stride + g * cache.head_stride;
  };
  const double* q = p.queries.q.at<double>(i, h);
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  scores.clear();
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const double* k = row(p.k, j);
    double dot = 0;
    for (int64_t d = 0; d < hd; ++d) dot += q[d] * k[d];
    scores.push_back(dot * p.queries.scale);
    largest = std::max(largest, scores.back());
  }
  std::vector<double> out(hd, 0.0);
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    const double weight = std::exp(scores[j - keys.begin] - largest);
    const double* v = row(p.v, j);
    sum += weight;
    for (int64_t d = 0; d < hd; ++d) out[d] += weight * v[d];
  }
  double* result = static_cast<double*>(p.queries.out_data) + (i * dims.num_heads + h) * hd;
  for (int64_t d = 0; d < hd; ++d) result[d] = sum != 0 ? out[d] / sum : 0.0;
  static_cast<double*>(p.queries.lse)[h * dims.num_queries + i] =
      sum != 0 ? largest + std::log(sum) : -std::numeric_limits<double>::infinity();
}

void scalar_attention(const PagedProblem& p) {
  const int64_t heads = p.queries.dims.num_heads;
  const int32_t* cu = p.queries.cu_q;
  for (int64_t b = 0; b < p.queries.dims.num_sequences; ++b) {
    torch::stable::parallel_for(cu[b] * heads, cu[b + 1] * heads, 16,
                                [&](int64_t begin, int64_t end) {
                                  std::vector<double> scores;
                                  for (int64_t row = begin; row < end; ++row)
                                    scalar_row(p, b, row / heads, row % heads, scores);
                                });
  }
}

// Rows whose results are merged from `count` parts of `keys` keys each, the first of which is
// number `first` of all.
struct Tile {
  AttentionTask rows;
  KeyRange seen;
  int64_t first, count, keys;
  int64_t memory;  // of its parts, in floats from the start of all
};

// Few rows (decoding) are a tile with all key heads, which are neighbours in memory; many, one
// with each key head.
std::vector<Tile> cut_rows(const PagedProblem& p) {
  const DepthAttentionDims& dims = p.queries.dims;
  const int32_t* cu = p.queries.cu_q;
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    const int64_t rows = (cu[b + 1] - cu[b]) * p.queries.group;
    const int64_t heads = rows <= kFewRows ? dims.num_kv_heads : 1;
    for (int64_t head = 0; head < dims.num_kv_heads; head += heads) {
      for (int64_t begin = 0; begin < rows; begin += kForwardRows) {
        const int64_t end = std::min(begin + kForwardRows, rows);
        const KeyRange seen =
            keys_seen(p, cu[b] + begin / p.queries.group, cu[b] + (end - 1) / p.queries.group);
        tiles.push_back({{b, head, heads, begin, end}, seen, 0, 0, 0, 0});
      }
    }
  }
  return tiles;
}

// Parts of about equal numbers of keys: so many that threads end together, not so small that what
// a part costs beside its keys would show. A choice by the sizes of the tile's own entry, never by
// threads or by other entries: a sequence has the same result in any company.
struct Parts {
  static constexpr int64_t kEnough = 128, kLeastKeys = 256;  // parts of an entry; keys of a part
  int64_t count = 0, memory = 0;

  Parts(const PagedProblem& p, std::vector<Tile>& tiles) {
    constexpr int64_t kUnit = 128;  // whole blocks of keys
    for (auto begin = tiles.begin(); begin != tiles.end();) {
      const auto end = std::find_if(begin, tiles.end(), [&](const Tile& tile) {
        return tile.rows.sequence != begin->rows.sequence;
      });
      int64_t keys = 0;
      for (auto tile = begin; tile != end; ++tile) keys += tile->seen.end - tile->seen.begin;
      const int64_t most = std::max(keys / kEnough, kLeastKeys);
      for (; begin != end; ++begin) {
        const int64_t length = begin->seen.end - begin->seen.begin;
        const int64_t wanted = std::max<int64_t>((length + most - 1) / most, 1);
        begin->keys = std::max((length / wanted + kUnit) / kUnit * kUnit, kUnit);
        begin->first = count;
        begin->count = std::max<int64_t>((length + begin->keys - 1) / begin->keys, 1);
        begin->memory = memory;
        count += begin->count;
        memory += begin->count * size(p, *begin);
      }
    }
  }

  // Floats of one part.
  static int64_t size(const PagedProblem& p, const Tile& tile) {
    return PagedTask{tile.rows, 0, 0}.num_rows() * part_stride(p.queries.dims.head_dim);
  }
};

void tiled_attention(const PagedProblem& p) {
  std::vector<Tile> tiles = cut_rows(p);
  const Parts parts(p, tiles);
  const auto part = MOR_BEST(paged_part);
  const auto merge = MOR_BEST(paged_merge);
  int64_t bytes = 0;
  double products = 0;
  for (const Tile& tile : tiles) {
    const PagedTask task{tile.rows, tile.seen.begin, tile.seen.end};
    bytes = std::max(bytes, part(p, task, nullptr, nullptr));
    products += 1.0 * task.num_rows() * (task.key_end - task.key_begin) * p.queries.dims.head_dim;
  }
  const Scratch memory = allocate(parts.memory * int64_t{sizeof(float)});
  float* results = reinterpret_cast<float*>(memory.get());
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[tiles.size()]);
  for (size_t t = 0; t < tiles.size(); ++t) left[t] = tiles[t].count;
  // Waking threads costs some microseconds, as much as about this many products.
  int64_t threads = products < 2e5 ? 1 : torch::stable::get_num_threads();
  threads = std::min(threads, parts.count);
  std::atomic<int64_t> next{0};
  // Threads take parts in turn from a counter, the later rows, which see more keys, first; who
  // finishes the last part of a tile merges them. Which thread does what changes no result.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Scratch scratch = allocate(bytes);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts.count;) {
      const int64_t number = parts.count - 1 - i;
      const auto after = std::upper_bound(tiles.begin(), tiles.end(), number,
                                          [](int64_t n, const Tile& t) { return n < t.first; });
      const Tile& tile = *(after - 1);
      const int64_t in_tile = number - tile.first, begin = tile.seen.begin + in_tile * tile.keys;
      const PagedTask task{tile.rows, begin, std::min(begin + tile.keys, tile.seen.end)};
      float* to = results + tile.memory;
      part(p, task, to + in_tile * Parts::size(p, tile), scratch.get());
      if (left[&tile - tiles.data()].fetch_sub(1, std::memory_order_acq_rel) == 1)
        merge(p, tile.rows, to, tile.count);
    }
  });
}

std::tuple<Tensor, Tensor> paged_depth_attention_cpu(
    const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table_in,
    const Tensor& context_lens_in, const Tensor& cu_seqlens_q_in,
    const optional<Tensor>& context_starts_in, double scale) {
  const auto dims = check_paged_depth_attention(
      q_in, k_cache, v_cache, block_table_in, context_lens_in, cu_seqlens_q_in, context_starts_in);
  const Tensor q = last_contiguous(q_in);
  const Tensor block_table = as_contiguous(block_table_in);
  const Tensor context_lens = as_contiguous(context_lens_in);
  const Tensor cu_seqlens_q = as_contiguous(cu_seqlens_q_in);
  const auto context_starts = as_contiguous(context_starts_in);

  PagedProblem p{};
  p.queries.dims = {dims.num_queries,        0,
                    dims.num_entries,        dims.num_heads,
                    dims.cache.num_kv_heads, dims.cache.head_dim};
  p.queries.dtype = q.scalar_type();
  p.queries.group = dims.num_heads / dims.cache.num_kv_heads;
  p.queries.q = {q.const_data_ptr(), q.stride(0), q.stride(1)};
  p.queries.cu_q = cu_seqlens_q.const_data_ptr<int32_t>();
  p.queries.scale = scale;
  p.k = paged_cache(k_cache), p.v = paged_cache(v_cache);
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.max_blocks = dims.max_blocks, p.block_size = dims.cache.block_size;
  p.context_lens = context_lens.const_data_ptr<int32_t>();
  if (context_starts.has_value()) p.context_starts = context_starts->const_data_ptr<int32_t>();
  check_values(p, dims, cu_seqlens_q);

  const bool is_double = q.scalar_type() == ScalarType::Double;
  Tensor out = new_result(q, {dims.num_queries, dims.num_heads, dims.cache.head_dim});
  Tensor lse = new_tensor(q, {dims.num_heads, dims.num_queries},
                          is_double ? ScalarType::Double : ScalarType::Float);
  p.queries.out_data = out.mutable_data_ptr(), p.queries.lse = lse.mutable_data_ptr();
  if (is_double) scalar_attention(p);
  else tiled_attention(p);
  return {out, lse};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("paged_depth_attention", TORCH_BOX(&mor::paged_depth_attention_cpu));
}
