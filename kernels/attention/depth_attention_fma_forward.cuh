// Forward of depth_attention in float32 and float64.
#pragma once

#include "../tuning.h"
#include "depth_attention_fma.cuh"

namespace mor {

// k and v take turns in one buffer.
template <class T, int HEAD_DIM>
struct AttentionForwardSmem {
  using Acc = acc_t<T>;
  static constexpr int kQueries = AttentionFmaTile<Acc, HEAD_DIM>::kForward, kKeys = kQueries;
  RowTile<Acc, kQueries, HEAD_DIM> q;
  RowTile<Acc, kKeys, HEAD_DIM> kv;
  RowTile<Acc, kQueries, kKeys> weights;
  QueryMask<kQueries> queries;
  KeyFacts<Acc, kKeys> keys;
};

// One block: one tile of packed query rows for one key head, over all its keys, online softmax.
// The bound of one block per multiprocessor keeps the compiler from spilling for more.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(128, 1) depth_attention_forward_kernel(DepthAttention<T> p) {
  using Smem = AttentionForwardSmem<T, HEAD_DIM>;
  using Acc = acc_t<T>;
  constexpr int kQueries = Smem::kQueries, kKeys = Smem::kKeys;
  constexpr Acc kNone = Acc(-INFINITY);
  MOR_DYN_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int down = threadIdx.x / 8, across = threadIdx.x % 8;
  const SequenceTile place = find_tile(p.cu_seqlens_q, p.num_sequences, p.group(), kQueries,
                                       gridDim.x - 1 - blockIdx.x);  // longest rows first
  if (place.sequence < 0) return;
  QueryTile<T> tile(p, place.sequence, blockIdx.y);
  tile.move_to(place.first);
  const unsigned num_rows = min(unsigned(kQueries), tile.num_rows - tile.first);

  s.queries.load(p, tile);
  load_rows(s.q, p, [&](int r) { return tile.row(p.q, r); });
  __syncthreads();
  const unsigned key_begin = s.queries.keys[0].begin, key_end = s.queries.keys[num_rows - 1].end();
  const int least_depth = s.queries.least_depth();
  const auto next = [&](unsigned begin) {
    return next_key_tile(p.k_depths, least_depth, kKeys, begin, key_end);
  };

  Acc sums[kQueries / 16][HEAD_DIM / 8] = {}, top[kQueries / 16], total[kQueries / 16] = {};
  for (Acc& t : top) t = kNone;
  for (unsigned begin = next(key_begin); begin < key_end; begin = next(begin + kKeys)) {
    const auto load_keys = [&](const AttentionOperand<T>& from) {
      load_rows(s.kv, p, [&](int r) {
        return seen_key_row(p, from, tile.kv_head, begin + r, key_begin, key_end, least_depth);
      });
    };
    load_keys(p.k);
    s.keys.load(p, begin, key_end);
    __syncthreads();
    Acc scores[kQueries / 16][kKeys / 8];
    dot_rows(scores, s.q, s.kv);
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      const int r = down + 16 * i;
      Acc highest = top[i];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const int n = across + 8 * j;
        const bool visible =
            s.queries.keys[r].has(begin + n) && s.keys.depth[n] >= s.queries.depth[r];
        scores[i][j] = visible ? (scores[i][j] * p.scale + s.keys.bias[n]) * kLog2E<Acc> : kNone;
        highest = max(highest, scores[i][j]);
      }
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2) {
        highest = max(highest, __shfl_xor_sync(~0u, highest, lanes));
      }
      const Acc reference = highest == kNone ? Acc(0) : highest;
      const Acc shrink = exp2_acc(top[i] - reference);
      top[i] = highest;
      total[i] *= shrink;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) sums[i][d] *= shrink;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        const Acc weight = exp2_acc(scores[i][j] - reference);
        total[i] += weight;  // of this thread's keys only, until the end
        s.weights.data[r][across + 8 * j] = weight;
      }
    }
    __syncthreads();  // weights written, keys read
    load_keys(p.v);
    __syncthreads();
    add_rows(sums, s.kv, [&](int i, int n) { return s.weights.data[down + 16 * i][n]; });
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kQueries / 16; ++i) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      total[i] += __shfl_xor_sync(~0u, total[i], lanes);
    }
    const int r = down + 16 * i;
    if (!tile.has(r)) continue;
    const int64_t query = tile.query(r), head = tile.head(r);
    const bool sees = total[i] > 0;
    store_row<T, HEAD_DIM>(p.out + (query * p.num_heads + head) * p.head_dim, sums[i],
                           sees ? 1 / total[i] : Acc(0), p.head_dim);
    if (across == 0) {
      p.lse[head * p.num_queries + query] = sees ? top[i] * kLn2<Acc> + log_acc(total[i]) : kNone;
    }
  }
}

}  // namespace mor
