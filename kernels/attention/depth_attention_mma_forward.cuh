// Forward of depth_attention in bfloat16 and float16 on tensor cores.
#pragma once

#include "../tuning.h"
#include "depth_attention_mma.cuh"

namespace mor {

template <class T, int HEAD_DIM>
struct AttentionMmaForwardSmem {
  static constexpr int kQueries = AttentionMmaTile<HEAD_DIM>::kRows;
  static constexpr int kKeys = AttentionMmaTile<HEAD_DIM>::kForwardKeys;
  MmaTile<T, kQueries, HEAD_DIM> q;
  struct Stage {  // one is computed with while the other fills
    MmaTile<T, kKeys, HEAD_DIM> k, v;
    KeyFacts<float, kKeys> keys;
  } stages[2];
  QueryMask<kQueries> queries;
};

// One block: one tile of packed query rows for one key head, over all its keys, online softmax. A
// warp: 16 of the rows.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(128) depth_attention_mma_forward_kernel(DepthAttention<T> p) {
  using Smem = AttentionMmaForwardSmem<T, HEAD_DIM>;
  constexpr int kQueries = Smem::kQueries, kKeys = Smem::kKeys;
  MOR_DYN_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
  const SequenceTile place = find_tile(p.cu_seqlens_q, p.num_sequences, p.group(), kQueries,
                                       gridDim.x - 1 - blockIdx.x);  // longest rows first
  if (place.sequence < 0) return;
  QueryTile<T> tile(p, place.sequence, blockIdx.y);
  tile.move_to(place.first);
  const unsigned num_rows = min(unsigned(kQueries), tile.num_rows - tile.first);

  load_rows_async(s.q, p, [&](int r) { return tile.row(p.q, r); });
  s.queries.load(p, tile);
  __syncthreads();
  const unsigned key_begin = s.queries.keys[0].begin, key_end = s.queries.keys[num_rows - 1].end();
  const unsigned all_see_from = s.queries.keys[num_rows - 1].begin;
  const unsigned all_see_until = s.queries.keys[0].end();
  const int least_depth = s.queries.least_depth();
  const auto next = [&](unsigned begin) {
    return next_key_tile(p.k_depths, least_depth, kKeys, begin, key_end);
  };
  const auto fetch = [&](unsigned begin, typename Smem::Stage& stage) {
    const auto row = [&](const AttentionOperand<T>& from, int r) {
      return seen_key_row(p, from, tile.kv_head, begin + r, key_begin, key_end, least_depth);
    };
    load_rows_async(stage.k, p, [&](int r) { return row(p.k, r); });
    load_rows_async(stage.v, p, [&](int r) { return row(p.v, r); });
    stage.keys.load(p, begin, key_end, kLog2E<float>);
  };

  float sums[HEAD_DIM / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
  KeyRange my_keys[2];
  int my_depth[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    my_keys[half] = s.queries.keys[warp_row + lane / 4 + 8 * half];
    my_depth[half] = s.queries.depth[warp_row + lane / 4 + 8 * half];
  }
  const float scale = p.scale * kLog2E<float>;
  // Without a bias scores stay unscaled until the exponential, which then scales for nothing.
  const bool folded = p.key_bias == nullptr && scale > 0;
  const float unit = folded ? scale : 1.f;
  unsigned begin = next(key_begin);
  int turn = 0;
  if (begin < key_end) fetch(begin, s.stages[turn]);
  cp_async_commit();
  while (begin < key_end) {
    const unsigned following = next(begin + kKeys);
    if (following < key_end) fetch(following, s.stages[turn ^ 1]);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const auto& stage = s.stages[turn];
    float scores[kKeys / 8][4];
    dot_rows(scores, s.q, warp_row, stage.k);
    // Biases and masks are branches of the whole block: most tiles have neither, and instructions,
    // not products, are what the scores cost most.
    if (!folded) {
      for_each_score<kKeys>([&](int n, int r, int, int key) {
        scores[n][r] = scores[n][r] * scale + stage.keys.bias[key];
      });
    }
    if (p.k_depths != nullptr || begin < all_see_from || begin + kKeys > all_see_until) {
      for_each_score<kKeys>([&](int n, int r, int half, int key) {
        const bool visible =
            my_keys[half].has(begin + key) & (stage.keys.depth[key] >= my_depth[half]);
        if (!visible) scores[n][r] = -INFINITY;
      });
    }
    float highest[2] = {top[0], top[1]};
    for_each_score<kKeys>(
        [&](int n, int r, int half, int) { highest[half] = fmaxf(highest[half], scores[n][r]); });
    float reference[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = row_max(highest[half]);
      reference[half] = highest[half] == -INFINITY ? 0.f : highest[half] * unit;
      const float shrink = exp2_acc(top[half] * unit - reference[half]);
      top[half] = highest[half];
      total[half] *= shrink;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 8; ++d) {
        sums[d][2 * half] *= shrink;
        sums[d][2 * half + 1] *= shrink;
      }
    }
    for_each_score<kKeys>([&](int n, int r, int half, int) {
      scores[n][r] = exp2_acc(scores[n][r] * unit - reference[half]);
      total[half] += scores[n][r];  // of this lane's keys only, until the end
    });
    add_rows<T, kKeys, HEAD_DIM, HEAD_DIM>(sums, scores, stage.v, 0);
    __syncthreads();  // the stage may be filled again
    begin = following;
    turn ^= 1;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = row_sum(total[half]);
    const int r = warp_row + lane / 4 + 8 * half;
    if (!tile.has(r)) continue;
    const int64_t query = tile.query(r), head = tile.head(r);
    const bool sees = total[half] > 0;
    store_row<T, HEAD_DIM>(p.out + (query * p.num_heads + head) * p.head_dim, sums, half,
                           sees ? 1.f / total[half] : 0.f, 0, p.head_dim);
    if (lane % 4 == 0) {
      p.lse[head * p.num_queries + query] =
          sees ? top[half] * unit * kLn2<float> + logf(total[half]) : -INFINITY;
    }
  }
}

}  // namespace mor
