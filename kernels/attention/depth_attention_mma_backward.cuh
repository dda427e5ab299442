// Backward of depth_attention in bfloat16 and float16 on tensor cores; depth_attention_backward.cuh
// has the formulas.
#pragma once

#include "../tuning.h"
#include "depth_attention_mma.cuh"

namespace mor {

// Turns score and d_weight (<grad_out, v>) of one query and key into weight and d_score.
__device__ __forceinline__ void finish_score(float& score, float& d_weight, float unit, float lse,
                                             float delta) {
  score = exp2_acc(score * unit - lse);
  d_weight = score * (d_weight - delta);
}

template <class T, int HEAD_DIM>
struct AttentionMmaGradQSmem {
  using Tile = AttentionMmaTile<HEAD_DIM>;
  MmaTile<T, Tile::kRows, HEAD_DIM> q, grad_out;
  struct Stage {
    MmaTile<T, Tile::kStreamed, HEAD_DIM> k, v;
    KeyFacts<float, Tile::kStreamed> keys;
  } stages[Tile::kStages];
  QueryFacts<float, Tile::kRows> queries;
};

// One block: one tile of packed query rows for one key head, over all its keys. A warp: 16 rows.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(128) depth_attention_mma_grad_q_kernel(DepthAttention<T> p) {
  using Smem = AttentionMmaGradQSmem<T, HEAD_DIM>;
  using Tile = AttentionMmaTile<HEAD_DIM>;
  constexpr int kQueries = Tile::kRows, kKeys = Tile::kStreamed;
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
  load_rows_async(s.grad_out, p, [&](int r) { return tile.row(p.grad_out, r); });
  s.queries.load(p, tile, kLog2E<float>);
  __syncthreads();
  const unsigned key_begin = s.queries.mask.keys[0].begin;
  const unsigned key_end = s.queries.mask.keys[num_rows - 1].end();
  const unsigned all_see_from = s.queries.mask.keys[num_rows - 1].begin;
  const unsigned all_see_until = s.queries.mask.keys[0].end();
  const int least_depth = s.queries.mask.least_depth();
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

  const int my_row = warp_row + lane / 4;
  const float my_lse[2] = {s.queries.lse[my_row], s.queries.lse[my_row + 8]};
  const float my_delta[2] = {s.queries.delta[my_row], s.queries.delta[my_row + 8]};
  float sums[HEAD_DIM / 8][4] = {};
  const float scale = p.scale * kLog2E<float>, unit = p.key_bias != nullptr ? 1.f : scale;
  unsigned begin = next(key_begin);
  int turn = 0;
  if (begin < key_end) fetch(begin, s.stages[0]);
  cp_async_commit();
  while (begin < key_end) {
    const unsigned following = next(begin + kKeys);
    if (Tile::kStages == 2 && following < key_end) fetch(following, s.stages[turn ^ 1]);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const auto& stage = s.stages[turn];
    float scores[kKeys / 8][4], d_scores[kKeys / 8][4];
    dot_rows(scores, s.q, warp_row, stage.k);
    dot_rows(d_scores, s.grad_out, warp_row, stage.v);
    // Branches of the whole block, as in the forward.
    if (p.key_bias != nullptr) {
      for_each_score<kKeys>([&](int n, int r, int, int key) {
        scores[n][r] = scores[n][r] * scale + stage.keys.bias[key];
      });
    }
    for_each_score<kKeys>([&](int n, int r, int half, int) {
      finish_score(scores[n][r], d_scores[n][r], unit, my_lse[half], my_delta[half]);
    });
    if (p.k_depths != nullptr || begin < all_see_from || begin + kKeys > all_see_until) {
      for_each_score<kKeys>([&](int n, int r, int half, int key) {
        const int row = my_row + 8 * half;
        const bool visible = s.queries.mask.keys[row].has(begin + key) &
                             (stage.keys.depth[key] >= s.queries.mask.depth[row]);
        if (!visible) d_scores[n][r] = 0;
      });
    }
    add_rows<T, kKeys, HEAD_DIM, HEAD_DIM>(sums, d_scores, stage.k, 0);
    __syncthreads();  // the stage may be filled again
    if (Tile::kStages == 1 && following < key_end) {
      fetch(following, s.stages[0]);
      cp_async_commit();
    }
    begin = following;
    turn ^= Tile::kStages - 1;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = warp_row + lane / 4 + 8 * half;
    if (!tile.has(r)) continue;
    store_row<T, HEAD_DIM>(
        p.grad_q + (int64_t(tile.query(r)) * p.num_heads + tile.head(r)) * p.head_dim, sums, half,
        p.scale, 0, p.head_dim);
  }
}

template <class T, int HEAD_DIM>
struct AttentionMmaGradKvSmem {
  using Tile = AttentionMmaTile<HEAD_DIM>;
  MmaTile<T, Tile::kRows, HEAD_DIM> k, v;
  struct Stage {
    MmaTile<T, Tile::kStreamed, HEAD_DIM> q, grad_out;
    QueryFacts<float, Tile::kStreamed> queries;
  } stages[Tile::kStages];
  KeyFacts<float, Tile::kRows> keys;
};

// One block: one tile of keys for one key head, over all packed query rows of the sequence. A warp:
// 16 keys, and of their gradients kWidth head dimensions; scores stand with keys as rows.
template <class T, int HEAD_DIM>
__global__ void __launch_bounds__(AttentionMmaTile<HEAD_DIM>::kGradKvThreads)
    depth_attention_mma_grad_kv_kernel(DepthAttention<T> p) {
  using Smem = AttentionMmaGradKvSmem<T, HEAD_DIM>;
  using Tile = AttentionMmaTile<HEAD_DIM>;
  constexpr int kKeys = Tile::kRows, kQueries = Tile::kStreamed, kWidth = Tile::kGradKvWidth;
  MOR_DYN_SMEM(raw);
  Smem& s = *reinterpret_cast<Smem*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_key = warp % (kKeys / 16) * 16, first_dim = warp / (kKeys / 16) * kWidth;
  const SequenceTile place = find_tile(p.cu_seqlens_k, p.num_sequences, 1, kKeys, blockIdx.x);
  if (place.sequence < 0) return;
  const unsigned kv_head = blockIdx.y;
  const unsigned begin = unsigned(p.cu_seqlens_k[place.sequence]) + place.first;
  const unsigned end = min(begin + kKeys, unsigned(p.cu_seqlens_k[place.sequence + 1]));
  const auto key_row = [&](const AttentionOperand<T>& from, int r) {
    return begin + r < end ? from.at(begin + r, kv_head) : nullptr;
  };
  load_rows_async(s.k, p, [&](int r) { return key_row(p.k, r); });
  load_rows_async(s.v, p, [&](int r) { return key_row(p.v, r); });
  s.keys.load(p, begin, end, kLog2E<float>);
  __syncthreads();
  int deepest = INT32_MIN;
  for (unsigned n = lane; n < end - begin; n += 32) deepest = max(deepest, s.keys.depth[n]);
  deepest = __reduce_max_sync(~0u, deepest);

  QueryTile<T> tile(p, place.sequence, kv_head);
  const RowRange rows = rows_seeing(p, tile, begin, end);
  const auto next = [&](unsigned first) {
    return next_query_tile(p, tile, kQueries, begin, deepest, {first, rows.end});
  };
  const auto fetch = [&](typename Smem::Stage& stage) {  // the tile
    load_rows_async(stage.q, p, [&](int r) { return tile.row(p.q, r); });
    load_rows_async(stage.grad_out, p, [&](int r) { return tile.row(p.grad_out, r); });
    stage.queries.load(p, tile, kLog2E<float>);
  };

  float sums_k[kWidth / 8][4] = {}, sums_v[kWidth / 8][4] = {}, sums_bias[2] = {};
  const float scale = p.scale * kLog2E<float>, unit = p.key_bias != nullptr ? 1.f : scale;
  int turn = 0;
  tile.move_to(next(rows.first));
  bool more = tile.first < rows.end;
  if (more) fetch(s.stages[0]);
  cp_async_commit();
  while (more) {
    tile.move_to(next(tile.first + kQueries));
    more = tile.first < rows.end;
    if (Tile::kStages == 2 && more) fetch(s.stages[turn ^ 1]);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const auto& stage = s.stages[turn];
    float scores[kQueries / 8][4], d_scores[kQueries / 8][4];
    dot_rows(scores, s.k, warp_key, stage.q);
    dot_rows(d_scores, s.v, warp_key, stage.grad_out);
    const auto& seen = stage.queries.mask.keys;
    if (p.key_bias != nullptr) {
      for_each_score<kQueries>([&](int n, int r, int half, int) {
        scores[n][r] = scores[n][r] * scale + s.keys.bias[warp_key + lane / 4 + 8 * half];
      });
    }
    for_each_score<kQueries>([&](int n, int r, int, int row) {
      finish_score(scores[n][r], d_scores[n][r], unit, stage.queries.lse[row],
                   stage.queries.delta[row]);
    });
    // The last row sees nothing if there are fewer.
    if (p.k_depths != nullptr || min(seen[0].end(), seen[kQueries - 1].end()) < end ||
        seen[kQueries - 1].begin > begin) {
      for_each_score<kQueries>([&](int n, int r, int half, int row) {
        const int key = warp_key + lane / 4 + 8 * half;
        const bool visible =
            seen[row].has(begin + key) & (s.keys.depth[key] >= stage.queries.mask.depth[row]);
        if (!visible) scores[n][r] = d_scores[n][r] = 0;
      });
    }
    for_each_score<kQueries>(
        [&](int n, int r, int half, int) { sums_bias[half] += d_scores[n][r]; });
    add_rows<T, kQueries, HEAD_DIM, kWidth>(sums_v, scores, stage.grad_out, first_dim);
    add_rows<T, kQueries, HEAD_DIM, kWidth>(sums_k, d_scores, stage.q, first_dim);
    __syncthreads();  // the stage may be filled again
    if (Tile::kStages == 1 && more) {
      fetch(s.stages[0]);
      cp_async_commit();
    }
    turn ^= Tile::kStages - 1;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum_bias = row_sum(sums_bias[half]);
    const unsigned key = begin + warp_key + lane / 4 + 8 * half;
    if (key >= end) continue;
    const int64_t row = (int64_t(key) * p.num_kv_heads + kv_head) * p.head_dim;
    store_row<T, kWidth>(p.grad_k + row, sums_k, half, p.scale, first_dim, p.head_dim);
    store_row<T, kWidth>(p.grad_v + row, sums_v, half, 1.f, first_dim, p.head_dim);
    if (p.key_bias != nullptr && lane % 4 == 0 && first_dim == 0) {
      p.grad_bias_parts[int64_t(kv_head) * p.num_keys + key] = sum_bias;
    }
  }
}

}  // namespace mor
