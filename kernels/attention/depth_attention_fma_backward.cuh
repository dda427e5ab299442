// Backward of depth_attention in float32 and float64; depth_attention_backward.cuh has the
// formulas.
#pragma once

#include "../tuning.h"
#include "depth_attention_fma.cuh"

namespace mor {

// The weights and the gradients of the scores take turns in one buffer.
template <class T, int HEAD_DIM>
struct AttentionBackwardSmem {
  using Acc = acc_t<T>;
  static constexpr int kQueries = AttentionFmaTile<Acc, HEAD_DIM>::kBackward, kKeys = kQueries;
  using Part = Acc[kQueries / 16][kKeys / 8];  // of a thread: its rows and keys of the tile
  RowTile<Acc, kQueries, HEAD_DIM> q, grad_out;
  RowTile<Acc, kKeys, HEAD_DIM> k, v;
  RowTile<Acc, kQueries, kKeys> scores;
  QueryFacts<Acc, kQueries> queries;
  KeyFacts<Acc, kKeys> keys;

  __device__ __forceinline__ void load_queries(const DepthAttention<T>& p,
                                               const QueryTile<T>& tile) {
    queries.load(p, tile);
    load_rows(q, p, [&](int r) { return tile.row(p.q, r); });
    load_rows(grad_out, p, [&](int r) { return tile.row(p.grad_out, r); });
  }

  // The keys of a tile that begins at row `begin`, of which first .. end - 1 are seen.
  __device__ __forceinline__ void load_keys(const DepthAttention<T>& p, unsigned kv_head,
                                            unsigned begin, unsigned first, unsigned end,
                                            int least_depth) {
    keys.load(p, begin, end);
    const auto row = [&](const AttentionOperand<T>& from, int r) {
      return seen_key_row(p, from, kv_head, begin + r, first, end, least_depth);
    };
    load_rows(k, p, [&](int r) { return row(p.k, r); });
    load_rows(v, p, [&](int r) { return row(p.v, r); });
  }

  // The thread's weights and gradients of scores for the tiles loaded; key 0 is row `begin` of k.
  __device__ __forceinline__ void score(const DepthAttention<T>& p, unsigned begin, Part& weights,
                                        Part& d_scores) {
    const int down = threadIdx.x / 8, across = threadIdx.x % 8;
    dot_rows(weights, q, k);
    dot_rows(d_scores, grad_out, v);
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const int r = down + 16 * i, n = across + 8 * j;
        const bool visible =
            queries.mask.keys[r].has(begin + n) && keys.depth[n] >= queries.mask.depth[r];
        const Acc score = weights[i][j] * p.scale + keys.bias[n] - queries.lse[r];
        weights[i][j] = visible ? exp2_acc(score * kLog2E<Acc>) : Acc(0);
        d_scores[i][j] = visible ? weights[i][j] * (d_scores[i][j] - queries.delta[r]) : Acc(0);
      }
  }

  // Fills `scores`, which nobody reads any more, for the whole block; ends with a barrier.
  __device__ __forceinline__ void share(const Part& of_thread) {
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
        scores.data[threadIdx.x / 8 + 16 * i][threadIdx.x % 8 + 8 * j] = of_thread[i][j];
    __syncthreads();
  }
};

// One block: one tile of packed query rows for one key head, over all its keys.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(128, 1) depth_attention_grad_q_kernel(DepthAttention<T> p) {
  using Smem = AttentionBackwardSmem<T, HEAD_DIM>;
  using Acc = acc_t<T>;
  constexpr int kQueries = Smem::kQueries, kKeys = Smem::kKeys;
  MOR_DYN_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int down = threadIdx.x / 8;
  const SequenceTile place = find_tile(p.cu_seqlens_q, p.num_sequences, p.group(), kQueries,
                                       gridDim.x - 1 - blockIdx.x);  // longest rows first
  if (place.sequence < 0) return;
  QueryTile<T> tile(p, place.sequence, blockIdx.y);
  tile.move_to(place.first);
  const unsigned num_rows = min(unsigned(kQueries), tile.num_rows - tile.first);
  s.load_queries(p, tile);
  __syncthreads();
  const unsigned key_begin = s.queries.mask.keys[0].begin;
  const unsigned key_end = s.queries.mask.keys[num_rows - 1].end();
  const int least_depth = s.queries.mask.least_depth();
  const auto next = [&](unsigned begin) {
    return next_key_tile(p.k_depths, least_depth, kKeys, begin, key_end);
  };

  Acc sums[kQueries / 16][HEAD_DIM / 8] = {};
  for (unsigned begin = next(key_begin); begin < key_end; begin = next(begin + kKeys)) {
    s.load_keys(p, tile.kv_head, begin, key_begin, key_end, least_depth);
    __syncthreads();
    typename Smem::Part weights, d_scores;
    s.score(p, begin, weights, d_scores);
    s.share(d_scores);
    add_rows(sums, s.k, [&](int i, int n) { return s.scores.data[down + 16 * i][n]; });
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kQueries / 16; ++i) {
    const int r = down + 16 * i;
    if (!tile.has(r)) continue;
    store_row<T, HEAD_DIM>(
        p.grad_q + (int64_t(tile.query(r)) * p.num_heads + tile.head(r)) * p.head_dim, sums[i],
        p.scale, p.head_dim);
  }
}

// One block: one tile of keys for one key head, over all packed query rows of the sequence.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(128, 1) depth_attention_grad_kv_kernel(DepthAttention<T> p) {
  using Smem = AttentionBackwardSmem<T, HEAD_DIM>;
  using Acc = acc_t<T>;
  constexpr int kQueries = Smem::kQueries, kKeys = Smem::kKeys;
  MOR_DYN_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int down = threadIdx.x / 8, across = threadIdx.x % 8;
  const SequenceTile place = find_tile(p.cu_seqlens_k, p.num_sequences, 1, kKeys, blockIdx.x);
  if (place.sequence < 0) return;
  const unsigned kv_head = blockIdx.y;
  const unsigned begin = unsigned(p.cu_seqlens_k[place.sequence]) + place.first;
  const unsigned end = min(begin + kKeys, unsigned(p.cu_seqlens_k[place.sequence + 1]));
  s.load_keys(p, kv_head, begin, begin, end, INT32_MIN);
  __syncthreads();
  int deepest = INT32_MIN;
  for (unsigned n = threadIdx.x % 32; n < end - begin; n += 32)
    deepest = max(deepest, s.keys.depth[n]);
  deepest = __reduce_max_sync(~0u, deepest);

  QueryTile<T> tile(p, place.sequence, kv_head);
  const RowRange rows = rows_seeing(p, tile, begin, end);
  const auto next = [&](unsigned first) {
    return next_query_tile(p, tile, kQueries, begin, deepest, {first, rows.end});
  };

  Acc sums_k[kKeys / 16][HEAD_DIM / 8] = {}, sums_v[kKeys / 16][HEAD_DIM / 8] = {};
  Acc sums_bias[kKeys / 16] = {};
  for (tile.move_to(next(rows.first)); tile.first < rows.end;
       tile.move_to(next(tile.first + kQueries))) {
    s.load_queries(p, tile);
    __syncthreads();
    typename Smem::Part weights, d_scores;
    s.score(p, begin, weights, d_scores);
    s.share(weights);
    const auto shared = [&](int i, int m) { return s.scores.data[m][down + 16 * i]; };
    add_rows(sums_v, s.grad_out, shared);
    __syncthreads();
    s.share(d_scores);
    add_rows(sums_k, s.q, shared);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (across != 0 || p.key_bias == nullptr) break;
      for (int m = 0; m < kQueries; ++m) sums_bias[i] += shared(i, m);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
    const unsigned key = begin + down + 16 * i;
    if (key >= end) continue;
    const int64_t row = (int64_t(key) * p.num_kv_heads + kv_head) * p.head_dim;
    store_row<T, HEAD_DIM>(p.grad_k + row, sums_k[i], p.scale, p.head_dim);
    store_row<T, HEAD_DIM>(p.grad_v + row, sums_v[i], Acc(1), p.head_dim);
    if (across == 0 && p.key_bias != nullptr) {
      p.grad_bias_parts[int64_t(kv_head) * p.num_keys + key] = sums_bias[i];
    }
  }
}

}  // namespace mor
