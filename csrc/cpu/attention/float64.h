// depth_attention one row at a time, in plain loops: the float64 path.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "csrc/cpu/attention/depth_attention.simd.h"

namespace mor {

// First key of sequence b that a query at `position` cannot see for its position.
inline int64_t key_end(const AttentionProblem& p, int64_t b, int64_t position) {
  if (!p.causal) return p.cu_k[b + 1];
  return std::upper_bound(p.k_positions + p.cu_k[b], p.k_positions + p.cu_k[b + 1], position) -
         p.k_positions;
}

// First key of sequence b, up to `end`, that a query at `position` can see for its position. Keys
// before `end` are not after the query: unsigned differences cannot overflow.
inline int64_t key_begin(const AttentionProblem& p, int64_t b, int64_t position, int64_t end) {
  if (p.window == 0) return p.cu_k[b];
  const auto hidden = [&](int64_t key, int64_t) {
    return static_cast<uint64_t>(position) - static_cast<uint64_t>(key) >=
           static_cast<uint64_t>(p.window);
  };
  return std::lower_bound(p.k_positions + p.cu_k[b], p.k_positions + end, position, hidden) -
         p.k_positions;
}

// One query row of one head; `scores` is scratch.
template <class T, class Acc = T>
void scalar_attention_row(const AttentionProblem& p, int64_t b, int64_t i, int64_t h,
                          std::vector<Acc>& scores) {
  const int64_t hd = p.dims.head_dim, g = h / p.group;
  const int64_t position = p.q_positions[i], end = key_end(p, b, position);
  const int64_t begin = key_begin(p, b, position, end);
  const Acc* bias = static_cast<const Acc*>(p.key_bias);
  const T* q = p.q.at<T>(i, h);
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  Acc largest = -kInfinity, sum = 0;
  scores.assign(end - begin, -kInfinity);
  for (int64_t j = begin; j < end; ++j) {
    if (p.k_depths && p.k_depths[j] < p.q_depths[i]) continue;
    const T* k = p.k.at<T>(j, g);
    Acc dot = 0;
    for (int64_t d = 0; d < hd; ++d) dot += static_cast<Acc>(q[d]) * static_cast<Acc>(k[d]);
    const Acc score = dot * static_cast<Acc>(p.scale) + (bias ? bias[j] : Acc{0});
    scores[j - begin] = score;
    largest = std::max(largest, score);
  }
  std::vector<Acc> out(hd, Acc{0});
  for (int64_t j = begin; j < end; ++j) {
    if (scores[j - begin] == -kInfinity) continue;
    const Acc weight = std::exp(scores[j - begin] - largest);
    const T* v = p.v.at<T>(j, g);
    sum += weight;
    for (int64_t d = 0; d < hd; ++d) out[d] += weight * static_cast<Acc>(v[d]);
  }
  T* result = static_cast<T*>(p.out_data) + (i * p.dims.num_heads + h) * hd;
  for (int64_t d = 0; d < hd; ++d) result[d] = static_cast<T>(sum != 0 ? out[d] / sum : Acc{0});
  static_cast<Acc*>(p.lse)[h * p.dims.num_queries + i] =
      sum != 0 ? largest + std::log(sum) : -kInfinity;
}

// Every gradient of sequence b and key head g; grad_bias [Nk] belongs to this head alone.
template <class T, class Acc = T>
void scalar_attention_backward(const AttentionProblem& p, int64_t b, int64_t g, Acc* grad_bias) {
  const int64_t hd = p.dims.head_dim, heads = p.dims.num_heads, kv_heads = p.dims.num_kv_heads;
  const int64_t begin = p.cu_k[b], num_keys = p.cu_k[b + 1] - begin;
  const Acc scale = static_cast<Acc>(p.scale);
  const Acc* bias = static_cast<const Acc*>(p.key_bias);
  std::vector<Acc> grad_q(hd), grad_k(num_keys * hd, Acc{0}), grad_v(num_keys * hd, Acc{0});
  for (int64_t i = p.cu_q[b]; i < p.cu_q[b + 1]; ++i) {
    const int64_t position = p.q_positions[i], end = key_end(p, b, position);
    const int64_t first = key_begin(p, b, position, end);
    for (int64_t h = g * p.group; h < (g + 1) * p.group; ++h) {
      const T *q = p.q.at<T>(i, h), *out = p.out.at<T>(i, h), *grad = p.grad_out.at<T>(i, h);
      const Acc lse = static_cast<const Acc*>(p.lse)[h * p.dims.num_queries + i];
      Acc delta = 0;
      for (int64_t d = 0; d < hd; ++d)
        delta += static_cast<Acc>(grad[d]) * static_cast<Acc>(out[d]);
      grad_q.assign(hd, Acc{0});
      for (int64_t j = first; j < end; ++j) {
        if (p.k_depths && p.k_depths[j] < p.q_depths[i]) continue;
        const T *k = p.k.at<T>(j, g), *v = p.v.at<T>(j, g);
        Acc dot = 0, grad_weight = 0;
        for (int64_t d = 0; d < hd; ++d) {
          dot += static_cast<Acc>(q[d]) * static_cast<Acc>(k[d]);
          grad_weight += static_cast<Acc>(grad[d]) * static_cast<Acc>(v[d]);
        }
        const Acc score = dot * scale + (bias ? bias[j] : Acc{0});
        if (score == -std::numeric_limits<Acc>::infinity()) continue;
        const Acc weight = std::exp(score - lse), grad_score = weight * (grad_weight - delta);
        if (bias) grad_bias[j] += grad_score;
        Acc *grad_k_row = &grad_k[(j - begin) * hd], *grad_v_row = &grad_v[(j - begin) * hd];
        for (int64_t d = 0; d < hd; ++d) {
          grad_v_row[d] += weight * static_cast<Acc>(grad[d]);
          grad_k_row[d] += grad_score * scale * static_cast<Acc>(q[d]);
          grad_q[d] += grad_score * scale * static_cast<Acc>(k[d]);
        }
      }
      T* result = static_cast<T*>(p.grad_q) + (i * heads + h) * hd;
      for (int64_t d = 0; d < hd; ++d) result[d] = static_cast<T>(grad_q[d]);
    }
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    const int64_t row = ((begin + j) * kv_heads + g) * hd;
    for (int64_t d = 0; d < hd; ++d) {
      static_cast<T*>(p.grad_k)[row + d] = static_cast<T>(grad_k[j * hd + d]);
      static_cast<T*>(p.grad_v)[row + d] = static_cast<T>(grad_v[j * hd + d]);
    }
  }
}

}  // namespace mor
