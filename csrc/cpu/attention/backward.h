// Backward of depth_attention by tiles, weights recomputed from softmax_lse. Included by
// depth_attention.simd.cpp only.
//
// With S = K Q^T (scaled), P = exp(S - lse), dP = V dO^T and dS = P (dP - <dO, out>):
// dV = P dO, dQ = scale dS^T K, dK = scale dS Q, and the bias gets the row sums of dS.
#pragma once

#include "csrc/cpu/attention/pack.h"

namespace mor {
namespace MOR_ISA {

// [kBlockKeys][kBackwardRows] elements that hold kPerElement neighbouring lanes; rows of an odd
// number of cache lines.
template <class E>
constexpr int kLaneStride = kBackwardRows / kPerElement<E> + 16;

// Per lane of a step: softmax_lse in log2 units and <dO, out>.
struct RowGradients {
  float *lse, *delta;
};

// A step's weights and score gradients. By key along the lanes: p, ds; a group's by lane along the
// keys: ds_lanes (floats: the same as ds).
template <class E>
struct ScoreGradients {
  E *p, *ds, *ds_lanes;
};

// Values of two vectors of neighbouring lanes for key j.
inline void store_key(VecF low, VecF high, int64_t j, int64_t lane, float* to) {
  store(to + j * kLaneStride<float> + lane, low);
  store(to + j * kLaneStride<float> + lane + kLanes, high);
}
inline void store_pair_of_keys(VecF, VecF, int64_t, int, float*) {}
#if defined(__AVX512BF16__)
inline void store_key(VecF low, VecF high, int64_t j, int64_t lane, uint32_t* to) {
  _mm512_storeu_si512(to + j * kLaneStride<uint32_t> + lane / 2,
                      (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
inline void store_pair_of_keys(VecF even, VecF odd, int64_t j, int lane, uint32_t* to) {
  _mm512_storeu_si512(to + j / 2 * kWidth + lane, round_pairs(even, odd));
}
#endif

// From scores and dP [count][kWidth] of one group, whose first lane is `lane`, to P and dS. Keys up
// to `block.count` that the group does not see get zeros.
template <class E, bool kPlain>
void differentiate_scores(const float* scores, const float* dp, int64_t count, float scale,
                          const KeyBlock<E>& block, const RowLimits& seen, const RowGradients& rows,
                          int64_t lane, const ScoreGradients<E>& to, float* bias_sums) {
  static_assert(kVectors == 2);
  constexpr int kDegree = kPerElement<E> == 2 ? 4 : 6;
  VecF lse[2], delta[2];
  for (int n = 0; n < 2; ++n) {
    lse[n] = load(rows.lse + n * kLanes);
    delta[n] = load(rows.delta + n * kLanes);
  }
  for (int64_t j = 0; j < block.count; j += 2) {
    VecF ds[2][2]{};
    for (int odd = 0; odd < 2 && j + odd < block.count; ++odd) {
      VecF p[2]{};
      for (int n = 0; n < 2 && j + odd < count; ++n) {
        const int64_t at = (j + odd) * kWidth + n * kLanes;
        VecF x = load(scores + at) * splat(scale) - lse[n];
        if (!kPlain && block.bias) x += splat(block.bias[j + odd]);
        p[n] = exp2_vec<kDegree>(x);
        if (!kPlain) {
          const int32_t* depth = block.depths ? block.depths + j + odd : nullptr;
          p[n] = visible_rows(seen, n * kLanes, block.first + j + odd, depth) ? p[n] : VecF{};
        }
        ds[odd][n] = p[n] * (load(dp + at) - delta[n]);
      }
      store_key(p[0], p[1], j + odd, lane, to.p);
      store_key(ds[odd][0], ds[odd][1], j + odd, lane, to.ds);
      if (bias_sums) {
        float* sum = bias_sums + (j + odd) * kLanes;
        store(sum, load(sum) + ds[odd][0] + ds[odd][1]);
      }
    }
    for (int n = 0; n < 2; ++n) store_pair_of_keys(ds[0][n], ds[1][n], j, n * kLanes, to.ds_lanes);
  }
}

// sums[row of the key - first_key] += weights (by key along the lanes) times `rows` (reduced along
// the lanes). Lanes before the keys have weights of zero: each part of the keys begins at the first
// group that sees, by position, one of them.
template <class E>
void add_key_sums(const KeyBlock<E>& block, const ListedKeys& keys, int64_t first_key,
                  LaneRange seeing, int64_t padded, const E* weights, const E* rows, float* tile,
                  float* sums) {
  constexpr int64_t kKeysUnit = 16;  // of a tile of AMX
  static_assert(kBlockKeys % kKeysUnit == 0 && kKeysUnit % kTileRows == 0);
  for (int64_t lane = seeing.begin, key = 0; key < block.count; lane += kWidth) {
    int64_t end = block.count;  // of the last group: all that are left
    if (lane + kWidth < seeing.end)
      end = min(end, round_up(keys.limits.limit[lane + kWidth - 1] - block.first, kKeysUnit));
    if (end <= key) continue;
    const int64_t depth = (seeing.end - lane) / kPerElement<E>, skipped = lane / kPerElement<E>;
    const E *part_weights = weights + key * kLaneStride<E> + skipped,
            *part_rows = rows + skipped * kKeyStride;
    float* part = tile + key * kKeyStride;
    int64_t d = 0;
    for (; d + kWidth <= padded; d += kWidth) {
      multiply<E, kVectors, kLaneStride<E>, 1, kKeyStride, kKeyStride, Into::kOverwrite>(
          end - key, depth, part_weights, part_rows + d, part + d);
    }
    for (; d < padded; d += kLanes) {
      multiply<E, 1, kLaneStride<E>, 1, kKeyStride, kKeyStride, Into::kOverwrite>(
          end - key, depth, part_weights, part_rows + d, part + d);
    }
    key = end;
  }
  for (int64_t j = 0; j < block.count; ++j) {
    float* sum = sums + (keys.row(block.first + j) - first_key) * padded;
    for (int64_t d = 0; d < padded; d += kLanes)
      store(sum + d, load(sum + d) + load(tile + j * kKeyStride + d));
  }
}

// The step's rows for a reduction along the lanes, zeros up to the padded number of rows.
template <class T, class E>
void pack_rows(const AttentionOperand& x, const AttentionProblem& p, const AttentionTask& step,
               int64_t padded, E* to) {
  const int64_t rows = step.row_end - step.row_begin;
  const auto at = [&](int64_t row) {
    const RowIndex index = row_index(p, step, step.row_begin + row);
    return x.at<T>(index.query, index.head);
  };
  for (int64_t row = 0; row < round_up(rows, kWidth); row += kPerElement<E>) {
    E* line = to + row / kPerElement<E> * kKeyStride;
    if (row < rows)
      copy_rows(at(row), row + 1 < rows ? at(row + 1) : nullptr, p.dims.head_dim, padded, line);
    else std::memset(line, 0, padded * sizeof(E));
  }
}

// <dO, out> is the diagonal of a product that is summed as dP = <dO, v>: a row that sees one key,
// whose out is its v, gets gradients of exactly 0. `out_rows` and `products` are scratch of kWidth
// rows.
template <class T, class E>
void fill_row_gradients(const AttentionProblem& p, const AttentionTask& step, int64_t padded,
                        const E* grad_lanes, E* out_rows, float* products, const RowGradients& to) {
  const int64_t rows = step.row_end - step.row_begin, depth = padded / kPerElement<E>;
  for (int64_t lane = 0; lane < rows; lane += kWidth) {
    for (int64_t i = 0; i < kWidth; ++i) {
      const RowIndex at = row_index(p, step, step.row_begin + min(lane + i, rows - 1));
      copy_row(p.out.at<T>(at.query, at.head), p.dims.head_dim, padded,
               out_rows + i * kRowStride<E>);
    }
    multiply<E, kVectors, kRowStride<E>, 1, kWidth, kWidth, Into::kOverwrite>(
        kWidth, depth, out_rows, grad_lanes + lane * depth, products);
    for (int64_t i = 0; i < kWidth; ++i) to.delta[lane + i] = products[i * kWidth + i];
  }
  for (int64_t row = 0; row < round_up(rows, kWidth); ++row) {
    to.lse[row] = kInfinity;  // a weight of 0
    if (row >= rows) continue;
    const RowIndex at = row_index(p, step, step.row_begin + row);
    const float lse = static_cast<const float*>(p.lse)[at.head * p.dims.num_queries + at.query];
    if (lse != -kInfinity) to.lse[row] = lse * kLog2e;
  }
}

template <class T>
void write_grad_q(const AttentionProblem& p, const AttentionTask& step, const float* dq,
                  int64_t padded) {
  const int64_t hd = p.dims.head_dim, rows = step.row_end - step.row_begin;
  for (int64_t first = 0; first < rows; first += kWidth) {
    const auto write = [&](int64_t lane, const float* line) {
      const RowIndex at = row_index(p, step, step.row_begin + first + lane);
      store_row(line, hd, static_cast<T*>(p.grad_q) + (at.query * p.dims.num_heads + at.head) * hd,
                static_cast<float>(p.scale));
    };
    unpack_lanes(dq + first * padded, min(kWidth, rows - first), padded, write);
  }
}

template <class T, class E>
int64_t backward_tiles(const AttentionProblem& p, const AttentionTask& task,
                       const KeyGradients& sums, char* scratch) {
  const int64_t padded = round_up(p.dims.head_dim, 16), depth = padded / kPerElement<E>;
  const int64_t first_key = p.cu_k[task.sequence];
  const int64_t sequence_keys = p.cu_k[task.sequence + 1] - first_key;
  constexpr bool kPairs = kPerElement<E> == 2;
  Arena arena{scratch};
  E* q_lanes = arena.take<E>(kBackwardRows * depth);
  E* grad_lanes = arena.take<E>(kBackwardRows * depth);
  E* q_rows = arena.take<E>(kBackwardRows / kPerElement<E> * kKeyStride);
  E* grad_rows = arena.take<E>(kBackwardRows / kPerElement<E> * kKeyStride);
  float* dq = arena.take<float>(kBackwardRows * padded);
  const RowGradients rows{arena.take<float>(kBackwardRows), arena.take<float>(kBackwardRows)};
  ListedKeys keys(p, task.sequence, kBackwardRows, arena);
  float* scores = arena.take<float>(kBlockKeys * kWidth);
  float* dp = arena.take<float>(kBlockKeys * kWidth);
  ScoreGradients<E> gradients{arena.take<E>(kBlockKeys * kLaneStride<E>),
                              arena.take<E>(kBlockKeys * kLaneStride<E>),
                              arena.take<E>(kPairs ? kBlockKeys / 2 * kWidth : 0)};
  float* tile = arena.take<float>(kBlockKeys * kKeyStride);
  KeyBlock<E> block{};
  block.k_rows = arena.take<E>(kBlockKeys * kRowStride<E>);
  block.v_rows = arena.take<E>(kBlockKeys * kRowStride<E>);
  block.k_keys = kPairs ? arena.take<E>(kKeysElements<E>) : block.k_rows;
  float* bias_sums = arena.take<float>(p.key_bias ? kBlockKeys * kLanes : 0);
  if (!scratch) return arena.used;

  std::memset(sums.k, 0, sequence_keys * padded * sizeof(float));
  std::memset(sums.v, 0, sequence_keys * padded * sizeof(float));
  if (p.key_bias) std::memset(sums.bias, 0, sequence_keys * sizeof(float));
  const float log2_scale = static_cast<float>(p.scale * 1.4426950408889634);
  const Tiles tiles;
  AttentionTask step = task;
  for (; step.row_begin < task.row_end; step.row_begin = step.row_end) {
    step.row_end = min(step.row_begin + kBackwardRows, task.row_end);
    const int64_t lanes = round_up(step.row_end - step.row_begin, kWidth);
    keys.list_for(step);
    pack_lanes<T>(p.q, p, step, padded, q_lanes);
    pack_lanes<T>(p.grad_out, p, step, padded, grad_lanes);
    pack_rows<T>(p.q, p, step, padded, q_rows);
    pack_rows<T>(p.grad_out, p, step, padded, grad_rows);
    fill_row_gradients<T>(p, step, padded, grad_lanes, block.k_rows, scores, rows);
    std::memset(dq, 0, lanes * padded * sizeof(float));

    for (block.first = 0; block.first < keys.end; block.first += kBlockKeys) {
      block.count = min(kBlockKeys, keys.end - block.first);
      const LaneRange seeing = lanes_that_see(keys.limits, lanes, block.first, block.count);
      if (seeing.begin == seeing.end) continue;
      pack_keys<T>(keys, task.kv_head, p.dims.head_dim, padded, block);
      if (p.key_bias) std::memset(bias_sums, 0, block.count * kLanes * sizeof(float));
      for (int64_t lane = seeing.begin; lane < seeing.end; lane += kWidth) {
        const RowLimits seen = keys.limits.from(lane);
        const int64_t count = min(block.count, seen.limit[kWidth - 1] - block.first);
        multiply<E, kVectors, kRowStride<E>, 1, kWidth, kWidth, Into::kOverwrite>(
            count, depth, block.k_rows, q_lanes + lane * depth, scores);
        multiply<E, kVectors, kRowStride<E>, 1, kWidth, kWidth, Into::kOverwrite>(
            count, depth, block.v_rows, grad_lanes + lane * depth, dp);
        const bool plain = all_see(seen, block.first, count) && !block.bias && !block.depths;
        const auto differentiate =
            plain ? &differentiate_scores<E, true> : &differentiate_scores<E, false>;
        differentiate(scores, dp, count, log2_scale, block, seen,
                      {rows.lse + lane, rows.delta + lane}, lane, gradients,
                      p.key_bias ? bias_sums : nullptr);
        if constexpr (kPairs) {
          const int64_t reduced = lengthen(gradients.ds_lanes, round_up(count, 2) / 2, kWidth);
          multiply<E, kVectors, kKeysRow<E>, kKeysDepth<E>, kWidth, kWidth, Into::kAdd>(
              padded, reduced, block.k_keys, gradients.ds_lanes, dq + lane * padded);
        } else {
          multiply<E, kVectors, 1, kKeyStride, kLaneStride<E>, kWidth, Into::kAdd>(
              padded, count, block.k_keys, gradients.ds + lane, dq + lane * padded);
        }
      }
      add_key_sums(block, keys, first_key, seeing, padded, gradients.p, grad_rows, tile, sums.v);
      add_key_sums(block, keys, first_key, seeing, padded, gradients.ds, q_rows, tile, sums.k);
      for (int64_t j = 0; p.key_bias && j < block.count; ++j) {
        sums.bias[keys.row(block.first + j) - first_key] +=
            reduce_add(load(bias_sums + j * kLanes));
      }
    }
    write_grad_q<T>(p, step, dq, padded);
  }
  return arena.used;
}

template <class T>
void sum_key_gradients(const AttentionProblem& p, int64_t sequence, int64_t kv_head,
                       const KeyGradients& sums, int64_t count, int64_t stride,
                       int64_t bias_stride) {
  const int64_t hd = p.dims.head_dim, padded = round_up(hd, 16);
  const int64_t begin = p.cu_k[sequence], end = p.cu_k[sequence + 1];
  alignas(64) float line[kMaxHeadDim];
  const auto write = [&](const float* from, int64_t row, float scale, void* to) {
    for (int64_t d = 0; d < padded; d += kLanes) {
      VecF sum{};
      for (int64_t c = 0; c < count; ++c)
        sum += load(from + c * stride + (row - begin) * padded + d);
      store(line + d, sum);
    }
    store_row(line, hd, static_cast<T*>(to) + (row * p.dims.num_kv_heads + kv_head) * hd, scale);
  };
  for (int64_t row = begin; row < end; ++row) {
    write(sums.k, row, static_cast<float>(p.scale), p.grad_k);
    write(sums.v, row, 1.0f, p.grad_v);
    if (!p.key_bias) continue;
    float sum = 0;
    for (int64_t c = 0; c < count; ++c) sum += sums.bias[c * bias_stride + row - begin];
    sums.bias[row - begin] = sum;
  }
}

}  // namespace MOR_ISA
}  // namespace mor
