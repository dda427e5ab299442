// Attention of packed queries over a paged key/value cache: the contract is in
// csrc/ops/paged_depth_attention.h.
//
// Made for decoding, which reads every key once and is bound by that. A block owns a few packed
// query rows (query, head of a group) of one entry and key head, and one of num_splits pieces of
// their keys; pieces are merged by a second kernel in a fixed order. A row of K or V is read in
// 16-byte chunks by as many lanes as it has chunks; so a warp reads several keys at once, and each
// such group of lanes keeps an online softmax of its own until the end. The grid and the pieces
// follow from sizes alone: no word from the device to the host, and a captured graph serves any
// lengths. With many queries of an entry (prefill) each tile of rows reads the keys again, from
// cache at best, and without tensor cores: right, not fast; depth_attention over the rows of
// kv_gather is the fast way.
#pragma once

#include "depth_attention.cuh"

namespace mor {

constexpr int kPagedThreads = 128;
constexpr int kPagedSplitKeys = 128;   // pieces of fewer keys are not worth a block
constexpr int kPagedBlocks = 132 * 8;  // wanted in flight

template <class T>
struct PagedCache {
  const T* data;
  int64_t block_stride, row_stride, head_stride;  // in elements; the last dimension is contiguous
};

template <class T>
struct PagedDepthAttention {
  AttentionOperand<T> q;
  PagedCache<T> k, v;
  const int32_t *block_table, *context_lens, *cu_seqlens_q;
  const int32_t* context_starts;  // optional
  int64_t num_queries, max_blocks, block_size;
  int num_entries, num_heads, num_kv_heads, head_dim;
  acc_t<T> scale;
  bool aligned;      // every row of every operand is a whole number of aligned 16-byte chunks
  int num_splits;    // paged_splits
  T* out;            // [N, H, hd]
  acc_t<T>* lse;     // [H, N]
  acc_t<T>* parts;   // [num_splits, N * H, hd] scratch, if num_splits > 1
  acc_t<T>* totals;  // [num_splits, N * H, 2] scratch: largest score, sum of weights

  __host__ __device__ int group() const { return num_heads / num_kv_heads; }
};

// How head dimensions lie in lanes: kChunks chunks of kElements neighbours each, kLanes * kElements
// apart.
template <class T, int HEAD_DIM>
struct PagedLanes {
  static constexpr int kElements = 16 / int(sizeof(T));
  static constexpr int kLanes = HEAD_DIM / kElements < 32 ? HEAD_DIM / kElements : 32;
  static constexpr int kChunks = HEAD_DIM / (kLanes * kElements);
  static constexpr int kUnroll = kChunks * sizeof(T) > 4 ? 1 : 2;  // keys of a lane in flight
};

// A lane's part of a row.
template <class T, int HEAD_DIM>
struct PagedChunks {
  uint4 x[PagedLanes<T, HEAD_DIM>::kChunks];
};

template <class T, int HEAD_DIM, int ROWS>
struct PagedSmem {
  static constexpr int kWarps = kPagedThreads / 32;
  acc_t<T> out[kWarps][ROWS][HEAD_DIM];
  acc_t<T> top[kWarps][ROWS], total[kWarps][ROWS];
  KeyRange keys[ROWS];
};

// Zeros where `row` is null and past head_dim.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void load_paged_row(PagedChunks<T, HEAD_DIM>& to, const T* row,
                                               int head_dim, bool aligned) {
  using Lanes = PagedLanes<T, HEAD_DIM>;
  const int lane = threadIdx.x % Lanes::kLanes;
#pragma unroll
  for (int c = 0; c < Lanes::kChunks; ++c) {
    const int d = (c * Lanes::kLanes + lane) * Lanes::kElements;
    to.x[c] = uint4{};
    if (row == nullptr || d >= head_dim) continue;
    if (aligned) {
      to.x[c] = *reinterpret_cast<const uint4*>(row + d);
    } else {
      T part[Lanes::kElements];
#pragma unroll
      for (int e = 0; e < Lanes::kElements; ++e) {
        part[e] = d + e < head_dim ? row[d + e] : T(0);
      }
      memcpy(&to.x[c], part, 16);
    }
  }
}

template <class T>
__device__ __forceinline__ void unpack(acc_t<T> (&to)[16 / sizeof(T)], const uint4& chunk) {
  T part[16 / sizeof(T)];
  memcpy(part, &chunk, 16);
#pragma unroll
  for (int e = 0; e < int(16 / sizeof(T)); ++e) to[e] = to_acc(part[e]);
}

// From the largest score of a row, in units of log2, and the sum of its weights.
template <class T>
__device__ __forceinline__ void write_paged_lse(const PagedDepthAttention<T>& p, int64_t query,
                                                int64_t head, acc_t<T> top, acc_t<T> sum) {
  const bool sees = sum != 0;
  p.lse[head * p.num_queries + query] =
      sees ? top * kLn2<acc_t<T>> + log_acc(sum) : acc_t<T>(-INFINITY);
}

// The rows of a block: [first, first + count) of the packed (query, head of the group) rows of an
// entry and key head blockIdx.y.
struct PagedRows {
  unsigned entry, q_begin, first, group;
  int count;

  __device__ __forceinline__ int64_t query(int r) const {
    return int64_t(q_begin + (first + unsigned(r)) / group);
  }
  __device__ __forceinline__ int64_t head(int r) const {
    return int64_t(blockIdx.y) * group + (first + unsigned(r)) % group;
  }
};

// What a group of lanes has seen of its keys: each lane its chunks of the weighted values.
template <class T, int HEAD_DIM, int ROWS>
struct PagedSums {
  using Acc = acc_t<T>;
  using Lanes = PagedLanes<T, HEAD_DIM>;
  Acc out[ROWS][Lanes::kChunks][Lanes::kElements];
  Acc top[ROWS], total[ROWS];  // largest score, in units of log2, and sum of weights
};

// Rows r < count, scaled to units of log2; the others zero.
template <class T, int HEAD_DIM, int ROWS, class Rows>
__device__ __forceinline__ void load_paged_queries(const PagedDepthAttention<T>& p,
                                                   const PagedRows& rows, Rows& q) {
  using Lanes = PagedLanes<T, HEAD_DIM>;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    PagedChunks<T, HEAD_DIM> chunks;
    const T* row = r < rows.count ? p.q.at(rows.query(r), rows.head(r)) : nullptr;
    load_paged_row(chunks, row, p.head_dim, p.aligned);
#pragma unroll
    for (int c = 0; c < Lanes::kChunks; ++c) {
      unpack<T>(q[r][c], chunks.x[c]);
#pragma unroll
      for (int e = 0; e < Lanes::kElements; ++e) q[r][c][e] *= p.scale * kLog2E<acc_t<T>>;
    }
  }
}

// Key `key` of the entry whose block numbers are `table`; zeros where it is not below `end`.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void load_paged_key(const PagedDepthAttention<T>& p,
                                               const int32_t* table, int64_t key, int64_t end,
                                               PagedChunks<T, HEAD_DIM>& k,
                                               PagedChunks<T, HEAD_DIM>& v) {
  const T *k_row = nullptr, *v_row = nullptr;
  if (key < end) {
    const uint32_t in_entry = uint32_t(key), size = uint32_t(p.block_size);
    const int64_t block = table[in_entry / size], offset = in_entry % size;
    k_row = p.k.data + block * p.k.block_stride + offset * p.k.row_stride +
            int64_t(blockIdx.y) * p.k.head_stride;
    v_row = p.v.data + block * p.v.block_stride + offset * p.v.row_stride +
            int64_t(blockIdx.y) * p.v.head_stride;
  }
  load_paged_row(k, k_row, p.head_dim, p.aligned);
  load_paged_row(v, v_row, p.head_dim, p.aligned);
}

// A lane's part of the products of one key with every row.
template <class T, int HEAD_DIM, int ROWS, class Rows>
__device__ __forceinline__ void score_paged_key(const Rows& q, const PagedChunks<T, HEAD_DIM>& k,
                                                acc_t<T> (&scores)[ROWS]) {
  using Lanes = PagedLanes<T, HEAD_DIM>;
#pragma unroll
  for (int c = 0; c < Lanes::kChunks; ++c) {
    acc_t<T> x[Lanes::kElements];
    unpack<T>(x, k.x[c]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int e = 0; e < Lanes::kElements; ++e) scores[r] += q[r][c][e] * x[e];
  }
}

// Adds the lanes of the scores of row r, whose keys are base, base + step, ..., and makes weights
// of them; older sums shrink to the new largest score.
template <class T, int HEAD_DIM, int ROWS, int COUNT>
__device__ __forceinline__ void weigh_paged_scores(PagedSums<T, HEAD_DIM, ROWS>& sums, int r,
                                                   const KeyRange& seen, int64_t base, int step,
                                                   int64_t end, acc_t<T> (&scores)[COUNT][ROWS]) {
  using Acc = acc_t<T>;
  using Lanes = PagedLanes<T, HEAD_DIM>;
  constexpr Acc kNone = Acc(-INFINITY);
  Acc highest = sums.top[r];
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    Acc& score = scores[u][r];
#pragma unroll
    for (int lanes = 1; lanes < Lanes::kLanes; lanes *= 2) {
      score += __shfl_xor_sync(~0u, score, lanes);
    }
    const int64_t key = base + u * step;
    if (key >= end || !seen.has(uint32_t(key))) score = kNone;
    highest = max(highest, score);
  }
  const Acc reference = highest == kNone ? Acc(0) : highest;
  const Acc shrink = exp2_acc(sums.top[r] - reference);
  sums.top[r] = highest;
  sums.total[r] *= shrink;
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    scores[u][r] = exp2_acc(scores[u][r] - reference);
    sums.total[r] += scores[u][r];
  }
#pragma unroll
  for (int c = 0; c < Lanes::kChunks; ++c)
#pragma unroll
    for (int e = 0; e < Lanes::kElements; ++e) sums.out[r][c][e] *= shrink;
}

template <class T, int HEAD_DIM, int ROWS>
__device__ __forceinline__ void add_paged_value(PagedSums<T, HEAD_DIM, ROWS>& sums,
                                                const acc_t<T> (&weights)[ROWS],
                                                const PagedChunks<T, HEAD_DIM>& v) {
  using Lanes = PagedLanes<T, HEAD_DIM>;
#pragma unroll
  for (int c = 0; c < Lanes::kChunks; ++c) {
    acc_t<T> x[Lanes::kElements];
    unpack<T>(x, v.x[c]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int e = 0; e < Lanes::kElements; ++e) sums.out[r][c][e] += weights[r] * x[e];
  }
}

// Merges the groups of each warp, into shared memory.
template <class T, int HEAD_DIM, int ROWS>
__device__ __forceinline__ void merge_paged_groups(PagedSums<T, HEAD_DIM, ROWS>& sums,
                                                   PagedSmem<T, HEAD_DIM, ROWS>& s) {
  using Acc = acc_t<T>;
  using Lanes = PagedLanes<T, HEAD_DIM>;
  constexpr Acc kNone = Acc(-INFINITY);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    Acc highest = sums.top[r];
#pragma unroll
    for (int lanes = Lanes::kLanes; lanes < 32; lanes *= 2) {
      highest = max(highest, __shfl_xor_sync(~0u, highest, lanes));
    }
    const Acc shrink = exp2_acc(sums.top[r] - (highest == kNone ? Acc(0) : highest));
    Acc total = sums.total[r] * shrink;
#pragma unroll
    for (int lanes = Lanes::kLanes; lanes < 32; lanes *= 2) {
      total += __shfl_xor_sync(~0u, total, lanes);
    }
#pragma unroll
    for (int c = 0; c < Lanes::kChunks; ++c)
#pragma unroll
      for (int e = 0; e < Lanes::kElements; ++e) {
        Acc x = sums.out[r][c][e] * shrink;
#pragma unroll
        for (int lanes = Lanes::kLanes; lanes < 32; lanes *= 2) {
          x += __shfl_xor_sync(~0u, x, lanes);
        }
        if (lane < Lanes::kLanes) {
          s.out[warp][r][(c * Lanes::kLanes + lane) * Lanes::kElements + e] = x;
        }
      }
    if (lane == 0) {
      s.top[warp][r] = highest;
      s.total[warp][r] = total;
    }
  }
}

// Merges the warps, and writes the rows, or their parts where keys are cut into pieces.
template <class T, int HEAD_DIM, int ROWS>
__device__ __forceinline__ void write_paged_rows(const PagedDepthAttention<T>& p,
                                                 const PagedRows& rows,
                                                 const PagedSmem<T, HEAD_DIM, ROWS>& s) {
  using Acc = acc_t<T>;
  constexpr Acc kNone = Acc(-INFINITY);
  for (int i = threadIdx.x; i < rows.count * HEAD_DIM; i += kPagedThreads) {
    const int r = i / HEAD_DIM, d = i % HEAD_DIM;
    Acc highest = kNone, sum = 0, x = 0;
#pragma unroll
    for (int w = 0; w < s.kWarps; ++w) highest = max(highest, s.top[w][r]);
#pragma unroll
    for (int w = 0; w < s.kWarps; ++w) {
      const Acc shrink = exp2_acc(s.top[w][r] - (highest == kNone ? Acc(0) : highest));
      sum += s.total[w][r] * shrink;
      x += s.out[w][r][d] * shrink;
    }
    const int64_t row = rows.query(r) * p.num_heads + rows.head(r);
    if (p.num_splits == 1) {
      if (d < p.head_dim) p.out[row * p.head_dim + d] = from_acc<T>(sum != 0 ? x / sum : Acc(0));
      if (d == 0) write_paged_lse(p, rows.query(r), rows.head(r), highest, sum);
    } else {
      const int64_t part = int64_t(blockIdx.z) * p.num_queries * p.num_heads + row;
      if (d < p.head_dim) p.parts[part * p.head_dim + d] = x;
      if (d == 0) p.totals[2 * part] = highest;
      if (d == 0) p.totals[2 * part + 1] = sum;
    }
  }
}

// One block: ROWS rows, piece blockIdx.z of the keys that any of them sees.
template <class T, int HEAD_DIM, int ROWS>
__global__ void __launch_bounds__(kPagedThreads)
    paged_depth_attention_kernel(PagedDepthAttention<T> p) {
  using Acc = acc_t<T>;
  using Lanes = PagedLanes<T, HEAD_DIM>;
  using Smem = PagedSmem<T, HEAD_DIM, ROWS>;
  constexpr int kUnroll = Lanes::kUnroll;
  MOR_DYN_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const unsigned group = unsigned(p.group());
  const SequenceTile place = find_tile(p.cu_seqlens_q, p.num_entries, int(group), ROWS, blockIdx.x);
  if (place.sequence < 0) return;
  const unsigned q_begin = unsigned(p.cu_seqlens_q[place.sequence]);
  const unsigned left = (unsigned(p.cu_seqlens_q[place.sequence + 1]) - q_begin) * group;
  const PagedRows rows{unsigned(place.sequence), q_begin, place.first, group,
                       int(min(unsigned(ROWS), left - place.first))};
  if (int(threadIdx.x) < ROWS) {
    const int r = threadIdx.x;
    uint32_t begin = 0, end = 0;
    if (r < rows.count) {
      begin = p.context_starts == nullptr ? 0 : uint32_t(p.context_starts[rows.query(r)]);
      end = uint32_t(p.context_lens[rows.query(r)]);
    }
    s.keys[r] = {begin, end > begin ? end - begin : 0};
  }
  Acc q[ROWS][Lanes::kChunks][Lanes::kElements];
  load_paged_queries<T, HEAD_DIM, ROWS>(p, rows, q);
  __syncthreads();
  // Neither contexts nor their starts fall from row to row.
  const int64_t all_begin = s.keys[0].begin, all_end = s.keys[rows.count - 1].end();
  int64_t piece = (max(all_end - all_begin, int64_t{0}) + p.num_splits - 1) / p.num_splits;
  piece = max(piece, int64_t{kPagedSplitKeys});
  const int64_t begin = all_begin + int64_t(blockIdx.z) * piece;
  const int64_t end = min(begin + piece, all_end);

  PagedSums<T, HEAD_DIM, ROWS> sums{};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sums.top[r] = Acc(-INFINITY);
  const int32_t* table = p.block_table + int64_t(rows.entry) * p.max_blocks;
  constexpr int kStep = kPagedThreads / Lanes::kLanes;  // keys of the block at once
  const int64_t mine = threadIdx.x / Lanes::kLanes;
  // Every lane of a warp takes part in each step: they shuffle.
  for (int64_t base = begin; base < end; base += kStep * kUnroll) {
    PagedChunks<T, HEAD_DIM> k[kUnroll], v[kUnroll];
    Acc scores[kUnroll][ROWS] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      load_paged_key(p, table, base + u * kStep + mine, end, k[u], v[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) score_paged_key(q, k[u], scores[u]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      weigh_paged_scores(sums, r, s.keys[r], base + mine, kStep, end, scores);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) add_paged_value(sums, scores[u], v[u]);
  }
  merge_paged_groups(sums, s);
  __syncthreads();
  write_paged_rows(p, rows, s);
}

// A warp owns a row (query, head), a lane every 32nd head dimension: merges its parts in order.
template <class T>
__global__ void __launch_bounds__(kPagedThreads)
    paged_depth_attention_merge_kernel(PagedDepthAttention<T> p) {
  using Acc = acc_t<T>;
  const int64_t rows = p.num_queries * p.num_heads;
  const int64_t step = int64_t(gridDim.x) * (kPagedThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t row = (int64_t(blockIdx.x) * kPagedThreads + threadIdx.x) / 32; row < rows;
       row += step) {
    Acc highest = Acc(-INFINITY), sum = 0;
    for (int s = 0; s < p.num_splits; ++s) {
      highest = max(highest, p.totals[2 * (s * rows + row)]);
    }
    const Acc reference = highest == Acc(-INFINITY) ? Acc(0) : highest;
    for (int s = 0; s < p.num_splits; ++s) {
      const Acc* total = p.totals + 2 * (s * rows + row);
      sum += total[1] * exp2_acc(total[0] - reference);
    }
    for (int d = lane; d < p.head_dim; d += 32) {
      Acc x = 0;
      for (int s = 0; s < p.num_splits; ++s) {
        const Acc shrink = exp2_acc(p.totals[2 * (s * rows + row)] - reference);
        x += p.parts[(s * rows + row) * p.head_dim + d] * shrink;
      }
      p.out[row * p.head_dim + d] = from_acc<T>(sum != 0 ? x / sum : Acc(0));
    }
    if (lane == 0) write_paged_lse(p, row / p.num_heads, row % p.num_heads, highest, sum);
  }
}

// Packed rows of a block: as many as an entry has on average, so that decoding wastes none.
inline int paged_rows(int64_t num_queries, int num_entries, int group) {
  const int64_t rows = (num_queries + num_entries - 1) / num_entries * group;
  return rows <= 1 ? 1 : rows <= 4 ? 4 : 8;
}

// Pieces into which keys are cut: enough blocks to fill the device, if the longest entry that
// block_table could hold is long enough. num_queries and num_entries are above 0.
inline int paged_splits(int64_t num_queries, int num_entries, int num_heads, int num_kv_heads,
                        int64_t max_keys) {
  const int group = num_heads / num_kv_heads;
  const int rows = paged_rows(num_queries, num_entries, group);
  const int64_t blocks = (num_queries * group + rows - 1) / rows * num_kv_heads;
  const int64_t wanted = (kPagedBlocks + blocks - 1) / blocks;
  const int64_t most = (max_keys + kPagedSplitKeys - 1) / kPagedSplitKeys;
  return int(max(int64_t{1}, min(min(wanted, most), int64_t{64})));
}

template <class T>
cudaError_t launch_paged_depth_attention(const PagedDepthAttention<T>& p, cudaStream_t stream) {
  if (p.num_queries == 0 || p.num_heads == 0 || p.num_entries == 0) return cudaSuccess;
  if (p.num_queries * p.group() > INT32_MAX) return cudaErrorInvalidValue;
  const int rows = paged_rows(p.num_queries, p.num_entries, p.group());
  const auto launch = [&]<int HEAD_DIM, int ROWS>() {
    const auto kernel = paged_depth_attention_kernel<T, HEAD_DIM, ROWS>;
    const int bytes = int(sizeof(PagedSmem<T, HEAD_DIM, ROWS>));
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const int64_t tiles = most_tiles(p.num_queries * p.group(), p.num_entries, ROWS);
    const dim3 grid(unsigned(tiles), unsigned(p.num_kv_heads), unsigned(p.num_splits));
    MOR_LAUNCH(kernel, grid, kPagedThreads, size_t(bytes), stream, p);
    return cudaGetLastError();
  };
  const cudaError_t error = dispatch_head_dim(p.head_dim, [&]<int HEAD_DIM>() {
    if constexpr (sizeof(T) == 8) {
      return launch.template operator()<HEAD_DIM, 2>();
    } else {
      if (rows == 1) return launch.template operator()<HEAD_DIM, 1>();
      if (rows == 4) return launch.template operator()<HEAD_DIM, 4>();
      return launch.template operator()<HEAD_DIM, 8>();
    }
  });
  if (error != cudaSuccess || p.num_splits == 1) return error;
  const auto merge = paged_depth_attention_merge_kernel<T>;
  MOR_LAUNCH(merge, grid_for(p.num_queries * p.num_heads, kPagedThreads / 32), kPagedThreads, 0,
             stream, p);
  return cudaGetLastError();
}

}  // namespace mor
