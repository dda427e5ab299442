// Attention by tiles, softmax online in float32. Included by the kernels of csrc/cpu/attention only.
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

// As attend_rows of decode.h, of one key head.
template <class T, class E, class Keys, class Write>
void attend_tiles(const AttentionProblem& p, const AttentionTask& task, Keys& keys, Arena& arena,
                  Write&& write) {
  const int64_t hd = p.dims.head_dim, padded = round_up(hd, 16), depth = padded / kPerElement<E>;
  const int64_t rows = task.row_end - task.row_begin, lanes = round_up(rows, kWidth);
  E* q = arena.take<E>(lanes * depth);
  float* out = arena.take<float>(lanes * padded);
  const RowSums sums{arena.take<float>(lanes), arena.take<float>(lanes)};
  float* scores = arena.take<float>(kBlockKeys * kWidth);
  E* weights = arena.take<E>(kBlockKeys / kPerElement<E> * kWidth);
  float* factor = arena.take<float>(kWidth);
  KeyBlock<E> block{};
  block.k_rows = arena.take<E>(kBlockKeys * kRowStride<E>);
  block.v_keys = arena.take<E>(kKeysElements<E>);
  if (!arena.base) return;

  pack_lanes<T>(p.q, p, task, padded, q);
  for (int64_t lane = 0; lane < lanes; ++lane) sums.base[lane] = -kInfinity;
  std::memset(sums.sum, 0, lanes * sizeof(float));
  std::memset(out, 0, lanes * padded * sizeof(float));
  const float log2_scale = static_cast<float>(p.scale * 1.4426950408889634);
  const Tiles tiles;

  for (block.first = keys.begin; block.first < keys.end; block.first += kBlockKeys) {
    block.count = min(kBlockKeys, keys.end - block.first);
    const LaneRange seeing = lanes_that_see(keys.limits, lanes, block.first, block.count);
    if (seeing.begin == seeing.end) continue;
    pack_keys<T>(keys, task.kv_head, hd, padded, block);
    attend_block(block, keys.limits, sums, seeing, padded, log2_scale, q, scores, weights, factor,
                 out);
  }
  for (int64_t first = 0; first < rows; first += kWidth) {
    unpack_lanes(out + first * padded, min(kWidth, rows - first), padded,
                 [&](int64_t lane, float* line) {
                   write(first + lane, line, sums.base[first + lane], sums.sum[first + lane]);
                 });
  }
}

}  // namespace MOR_ISA
}  // namespace mor
