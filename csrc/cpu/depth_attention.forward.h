// Forward of depth_attention by tiles, softmax online in float32. Included by
// depth_attention.simd.cpp only.
//
// Everything is transposed: scores [key][lane], out [d][lane], so that the softmax of a row is
// arithmetic between whole vectors and K and V are only ever broadcast, never transposed.
#pragma once

#include "depth_attention.pack.h"

namespace mor {
namespace MOR_ISA {

// A block of packed keys: k reduced along d, v reduced along the keys.
template <class E>
struct KeyBlock {
  int64_t first, count;  // in the task's list
  E *k, *v;
  float* bias;  // times log2(e); null: none
  int32_t* depths;
};

// What a group of lanes carries from block to block.
struct RowGroup {
  float *largest, *sum;    // [kWidth], the former in units of log2
  int32_t *limit, *depth;  // [kWidth]: keys visible by position, and depth of the query
};

template <class T, class E>
void pack_keys(const AttentionProblem& p, int64_t head, const KeyList& keys, int64_t padded,
               KeyBlock<E>& block) {
  const int64_t hd = p.dims.head_dim;
  for (int64_t j = 0; j < block.count; ++j) {
    const int64_t row = keys.row(block.first + j);
    copy_row(p.k.at<T>(row, head), hd, padded, block.k + j * kRowStride<E>);
    if (j % kPerElement<E> == 0) {
      const bool pair = kPerElement<E> == 2 && j + 1 < block.count;
      const T* next = pair ? p.v.at<T>(keys.row(block.first + j + 1), head) : nullptr;
      copy_keys(p.v.at<T>(row, head), next, hd, padded, block.v + j / kPerElement<E> * kKeyStride);
    }
    if (p.key_bias) block.bias[j] = static_cast<const float*>(p.key_bias)[row] * kLog2e;
    if (keys.mask_depths) block.depths[j] = p.k_depths[row];
  }
}

// Scores to units of log2 with bias and masks applied, when they are not plain.
inline void mask_scores(float* scores, int64_t count, int64_t first, float scale, const float* bias,
                        const int32_t* depths, const RowGroup& rows) {
  for (int n = 0; n < kVectors; ++n) {
    VecI limit, depth{};
    std::memcpy(&limit, rows.limit + n * kLanes, sizeof limit);
    if (depths) std::memcpy(&depth, rows.depth + n * kLanes, sizeof depth);
    for (int64_t j = 0; j < count; ++j) {
      float* score = scores + j * kWidth + n * kLanes;
      VecF x = load(score) * splat(scale);
      if (bias) x += splat(bias[j]);
      VecI visible = VecI{} + static_cast<int32_t>(first + j) < limit;
      if (depths) visible &= VecI{} + depths[j] >= depth;
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

// Scores [count][kWidth] times `scale` (log2 units) to weights; returns whether older sums shrank,
// by factor[lane].
template <class E>
bool softmax_step(const float* scores, int64_t count, float scale, RowGroup& rows, E* weights,
                  float* factor) {
  constexpr int kDegree = kPerElement<E> == 2 ? 4 : 6;
  bool shrank = false;
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
    const VecF before = load(rows.largest + lane);
    largest = before > largest ? before : largest;
    // A row that has seen nothing: 0 instead of -inf, for -inf - -inf is NaN.
    const VecF base = largest == splat(-kInfinity) ? VecF{} : largest;
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
    store(rows.largest + lane, largest);
    const VecI changed = before != largest;
    for (int i = 0; i < kLanes; ++i) shrank |= changed[i] != 0;
  }
  return shrank;
}

// Divides by the sums and turns the lanes of a group back to rows.
template <class T>
void write_rows(const AttentionProblem& p, const AttentionTask& task, int64_t first_row,
                int64_t count, const RowGroup& rows, const float* out, float* line) {
  const int64_t hd = p.dims.head_dim;
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t query = task.q_begin + (first_row + lane) / p.group;
    const int64_t head = task.kv_head * p.group + (first_row + lane) % p.group;
    const float sum = rows.sum[lane], inverse = sum != 0 ? 1 / sum : 0;
    for (int64_t d = 0; d < hd; ++d) line[d] = sum != 0 ? out[d * kWidth + lane] * inverse : 0;
    store_row(line, hd, static_cast<T*>(p.out_data) + (query * p.dims.num_heads + head) * hd);
    static_cast<float*>(p.lse)[head * p.dims.num_queries + query] =
        sum != 0 ? (rows.largest[lane] + __builtin_log2f(sum)) * kLn2 : -kInfinity;
  }
}

template <class T, class E>
int64_t forward_tiles(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  const int64_t hd = p.dims.head_dim, padded = round_up(hd, 16), depth = padded / kPerElement<E>;
  const int64_t rows = (task.q_end - task.q_begin) * p.group,
                groups = round_up(rows, kWidth) / kWidth;
  Arena arena{scratch};
  E* q = arena.take<E>(groups * depth * kWidth);
  float* out = arena.take<float>(groups * padded * kWidth);
  float* largest = arena.take<float>(groups * kWidth);
  float* sum = arena.take<float>(groups * kWidth);
  int32_t* limit = arena.take<int32_t>(groups * kWidth);
  int32_t* depths = arena.take<int32_t>(groups * kWidth);
  float* scores = arena.take<float>(kBlockKeys * kWidth);
  E* weights = arena.take<E>(kBlockKeys / kPerElement<E> * kWidth);
  float* factor = arena.take<float>(kWidth);
  float* line = arena.take<float>(kMaxHeadDim);
  KeyBlock<E> block{0,
                    0,
                    arena.take<E>(kBlockKeys * kRowStride<E>),
                    arena.take<E>(kBlockKeys / kPerElement<E> * kKeyStride),
                    nullptr,
                    arena.take<int32_t>(kBlockKeys)};
  float* bias = arena.take<float>(kBlockKeys);
  const int64_t sequence_keys = p.cu_k[task.sequence + 1] - p.cu_k[task.sequence];
  int32_t* list = arena.take<int32_t>(p.q_depths ? sequence_keys : 0);
  if (!scratch) return arena.used;

  if (p.key_bias) block.bias = bias;
  const KeyList keys = list_keys(p, task, list);
  pack_lanes<T, E>(p.q, p, task, rows, padded, q, reinterpret_cast<E*>(line));
  for (int64_t row = 0; row < groups * kWidth; ++row) {
    const int64_t query = task.q_begin + min(row, rows - 1) / p.group;
    const bool repeats = row > 0 && (row >= rows || row % p.group != 0);
    limit[row] = repeats ? limit[row - 1] : visible_keys(p, keys, p.q_positions[query]);
    depths[row] = p.q_depths ? p.q_depths[query] : 0;
    largest[row] = -kInfinity;
    sum[row] = 0;
  }
  std::memset(out, 0, groups * padded * kWidth * sizeof(float));
  const float log2_scale = static_cast<float>(p.scale * 1.4426950408889634);

  for (block.first = 0; block.first < keys.count; block.first += kBlockKeys) {
    block.count = min(kBlockKeys, keys.count - block.first);
    pack_keys<T>(p, task.kv_head, keys, padded, block);
    for (int64_t g = 0; g < groups; ++g) {
      RowGroup group{largest + g * kWidth, sum + g * kWidth, limit + g * kWidth,
                     depths + g * kWidth};
      const int64_t count = min(block.count, group.limit[kWidth - 1] - block.first);
      if (count <= 0) continue;
      multiply<E, kVectors, kRowStride<E>, 1, kWidth, kWidth, Into::kOverwrite>(
          count, depth, block.k, q + g * depth * kWidth, scores);
      const bool plain = group.limit[0] >= block.first + count && !p.key_bias &&
                         !keys.mask_depths && log2_scale > 0;
      if (!plain) {
        mask_scores(scores, count, block.first, log2_scale, block.bias,
                    keys.mask_depths ? block.depths : nullptr, group);
      }
      const bool shrank =
          softmax_step(scores, count, plain ? log2_scale : 1.0f, group, weights, factor);
      const int64_t reduced = round_up(count, kPerElement<E>) / kPerElement<E>;
      float* group_out = out + g * padded * kWidth;
      if (shrank) {
        multiply<E, kVectors, 1, kKeyStride, kWidth, kWidth, Into::kScaleAndAdd>(
            padded, reduced, block.v, weights, group_out, factor);
      } else {
        multiply<E, kVectors, 1, kKeyStride, kWidth, kWidth, Into::kAdd>(padded, reduced, block.v,
                                                                         weights, group_out);
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const RowGroup group{largest + g * kWidth, sum + g * kWidth, nullptr, nullptr};
    write_rows<T>(p, task, g * kWidth, min(kWidth, rows - g * kWidth), group,
                  out + g * padded * kWidth, line);
  }
  return arena.used;
}

}  // namespace MOR_ISA
}  // namespace mor
