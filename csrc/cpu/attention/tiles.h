// Forward of depth_attention by tiles, softmax online in float32. Included by
// depth_attention.simd.cpp only.
//
// Everything is transposed: scores [key][lane], out [d][lane], so that the softmax of a row is
// arithmetic between whole vectors and K and V are only ever broadcast; pairs of V in bfloat16 are
// transposed once for a block.
#pragma once

#include "csrc/cpu/attention/pack.h"

namespace mor {
namespace MOR_ISA {

// What a group of lanes carries from block to block, [kWidth] each: the score (in units of log2)
// whose weight is 1, within kSlack of the largest, and the sum of the weights.
struct RowSums {
  float *base, *sum;
};

// The base follows the largest score once that is this much above it: sums are hardly ever rescaled
// then, and floats are as exact for weights of up to 2^kSlack as for those of up to 1.
constexpr float kSlack = 8;

// Scores to units of log2 with bias and masks applied, when they are not plain.
inline void mask_scores(float* scores, int64_t count, int64_t first, float scale, const float* bias,
                        const int32_t* depths, const RowLimits& rows) {
  for (int64_t j = 0; j < count; ++j) {
    for (int lane = 0; lane < kWidth; lane += kLanes) {
      float* score = scores + j * kWidth + lane;
      VecF x = load(score) * splat(scale);
      if (bias) x += splat(bias[j]);
      const VecI visible = visible_rows(rows, lane, first + j, depths ? depths + j : nullptr);
      store(score, visible ? x : splat(-kInfinity));
    }
  }
}

inline void store_weights(VecF even, VecF odd, int64_t j, int64_t lane, bool has_odd, float* to) {
  store(to + j * kWidth + lane, even);
  if (has_odd) store(to + (j + 1) * kWidth + lane, odd);
}
#if defined(__AVX512BF16__)
inline void store_weights(VecF even, VecF odd, int64_t j, int64_t lane, bool, uint32_t* to) {
  _mm512_storeu_si512(to + j / 2 * kWidth + lane, round_pairs(even, odd));
}
#endif

// Scores [count][kWidth] times `scale` (log2 units) to weights; returns whether older sums shrink,
// by factor[lane].
template <class E>
bool softmax_step(const float* scores, int64_t count, float scale, const RowSums& rows, E* weights,
                  float* factor) {
  constexpr int kDegree = kPerElement<E> == 2 ? 4 : 6;
  bool shrinks = false;
  for (int n = 0; n < kVectors; ++n) {
    const int lane = n * kLanes;
    const float* column = scores + lane;
    VecF largest = splat(-kInfinity), second = largest;
    int64_t j = 0;
    for (; j + 2 <= count; j += 2) {
      const VecF a = load(column + j * kWidth), b = load(column + (j + 1) * kWidth);
      largest = a > largest ? a : largest;
      second = b > second ? b : second;
    }
    if (j < count) {
      const VecF a = load(column + j * kWidth);
      largest = a > largest ? a : largest;
    }
    largest = (second > largest ? second : largest) * splat(scale);
    const VecF before = load(rows.base + lane);
    const VecI grew = largest > before + splat(kSlack);
    const VecF after = grew ? largest : before;
    // A row that has seen nothing: 0 instead of -inf, for -inf - -inf is NaN.
    const VecF base = after == splat(-kInfinity) ? VecF{} : after;
    VecF even_sum{}, odd_sum{};
    for (j = 0; j < count; j += 2) {
      const bool has_odd = j + 1 < count;
      const VecF even = exp2_vec<kDegree>(load(column + j * kWidth) * splat(scale) - base);
      VecF odd{};
      if (has_odd) odd = exp2_vec<kDegree>(load(column + (j + 1) * kWidth) * splat(scale) - base);
      even_sum += even;
      odd_sum += odd;
      store_weights(even, odd, j, lane, has_odd, weights);
    }
    const VecF shrink = exp2_vec<6>(before - base);
    store(factor + lane, shrink);
    store(rows.sum + lane, load(rows.sum + lane) * shrink + (even_sum + odd_sum));
    store(rows.base + lane, after);
    const VecI rescaled = grew & (before != splat(-kInfinity));  // else the sums are zeros
    for (int i = 0; i < kLanes; ++i) shrinks |= rescaled[i] != 0;
  }
  return shrinks;
}

// Divides by the sums and turns the lanes of a group, whose first row is `row`, back to rows.
template <class T>
void write_rows(const AttentionProblem& p, const AttentionTask& task, int64_t row, int64_t count,
                const RowSums& rows, int64_t padded, const float* out) {
  const int64_t hd = p.dims.head_dim;
  unpack_lanes(out, count, padded, [&](int64_t lane, float* line) {
    const RowIndex at = row_index(p, task, row + lane);
    const float sum = rows.sum[lane];
    if (sum == 0) std::memset(line, 0, hd * sizeof(float));  // sees nothing; out may be 0 * inf
    store_row(line, hd, static_cast<T*>(p.out_data) + (at.query * p.dims.num_heads + at.head) * hd,
              sum != 0 ? 1 / sum : 1);
    static_cast<float*>(p.lse)[at.head * p.dims.num_queries + at.query] =
        log_sum(rows.base[lane], sum);
  });
}

// One packed block of keys added to the sums of the lanes that see some of them. q and out are
// those of all lanes, `padded` dimensions each; scores, weights and factor are scratch of kWidth
// lanes.
template <class E>
[[gnu::always_inline]] inline void attend_block(const KeyBlock<E>& block, const RowLimits& limits,
                                                const RowSums& sums, LaneRange seeing,
                                                int64_t padded, float log2_scale, const E* q,
                                                float* scores, E* weights, float* factor,
                                                float* out) {
  const int64_t depth = padded / kPerElement<E>;
  const auto count_of = [&](int64_t lane) {
    return min(block.count, limits.limit[lane + kWidth - 1] - block.first);
  };
  const auto score = [&](int64_t lane) {
    multiply<E, kVectors, kRowStride<E>, 1, kWidth, kWidth, Into::kOverwrite>(
        count_of(lane), depth, block.k_rows, q + lane * depth, scores);
  };
  score(seeing.begin);
  for (int64_t lane = seeing.begin; lane < seeing.end; lane += kWidth) {
    const RowSums group{sums.base + lane, sums.sum + lane};
    const RowLimits seen = limits.from(lane);
    const int64_t count = count_of(lane);
    const bool plain =
        all_see(seen, block.first, count) && !block.bias && !block.depths && log2_scale > 0;
    if (!plain) mask_scores(scores, count, block.first, log2_scale, block.bias, block.depths, seen);
    const float scale = plain ? log2_scale : 1.0f;
    const bool shrinks = softmax_step(scores, count, scale, group, weights, factor);
    const int64_t pairs = round_up(count, kPerElement<E>) / kPerElement<E>;
    const int64_t reduced = lengthen(weights, pairs, kWidth);
    // Before the weights are used: a tile of AMX can load them only from the cache.
    if (lane + kWidth < seeing.end) score(lane + kWidth);
    float* group_out = out + lane * padded;
    if (shrinks) {
      multiply<E, kVectors, kKeysRow<E>, kKeysDepth<E>, kWidth, kWidth, Into::kScaleAndAdd>(
          padded, reduced, block.v_keys, weights, group_out, factor);
    } else {
      multiply<E, kVectors, kKeysRow<E>, kKeysDepth<E>, kWidth, kWidth, Into::kAdd>(
          padded, reduced, block.v_keys, weights, group_out);
    }
  }
}

template <class T, class E>
int64_t forward_tiles(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  const int64_t padded = round_up(p.dims.head_dim, 16), depth = padded / kPerElement<E>;
  const int64_t rows = task.row_end - task.row_begin, groups = round_up(rows, kWidth) / kWidth;
  Arena arena{scratch};
  E* q = arena.take<E>(groups * depth * kWidth);
  float* out = arena.take<float>(groups * padded * kWidth);
  const RowSums sums{arena.take<float>(groups * kWidth), arena.take<float>(groups * kWidth)};
  const RowLimits limits = take_limits(arena, p, groups * kWidth);
  float* scores = arena.take<float>(kBlockKeys * kWidth);
  E* weights = arena.take<E>(kBlockKeys / kPerElement<E> * kWidth);
  float* factor = arena.take<float>(kWidth);
  KeyBlock<E> block{};
  block.k_rows = arena.take<E>(kBlockKeys * kRowStride<E>);
  block.v_keys = arena.take<E>(kKeysElements<E>);
  float* bias = arena.take<float>(kBlockKeys);
  int32_t* key_depths = arena.take<int32_t>(kBlockKeys);
  const int64_t sequence_keys = p.cu_k[task.sequence + 1] - p.cu_k[task.sequence];
  int32_t* list = arena.take<int32_t>(p.q_depths ? sequence_keys : 0);
  if (!scratch) return arena.used;

  const KeyList keys = list_keys(p, task, list);
  if (p.key_bias) block.bias = bias;
  if (keys.mask_depths) block.depths = key_depths;
  pack_lanes<T>(p.q, p, task, padded, q);
  fill_limits(p, task, keys, limits);
  for (int64_t row = 0; row < groups * kWidth; ++row) sums.base[row] = -kInfinity;
  std::memset(sums.sum, 0, groups * kWidth * sizeof(float));
  std::memset(out, 0, groups * padded * kWidth * sizeof(float));
  const float log2_scale = static_cast<float>(p.scale * 1.4426950408889634);
  const Tiles tiles;

  for (; block.first < keys.count; block.first += kBlockKeys) {
    block.count = min(kBlockKeys, keys.count - block.first);
    const LaneRange seeing = lanes_that_see(limits, groups * kWidth, block.first, block.count);
    if (seeing.begin == seeing.end) continue;
    pack_keys<T>(p, task.kv_head, keys, padded, block);
    attend_block(block, limits, sums, seeing, padded, log2_scale, q, scores, weights, factor, out);
  }
  for (int64_t lane = 0; lane < rows; lane += kWidth) {
    write_rows<T>(p, task, task.row_begin + lane, min(kWidth, rows - lane),
                  {sums.base + lane, sums.sum + lane}, padded, out + lane * padded);
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
