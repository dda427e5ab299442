// depth_attention: attention over packed sequences in which a token takes part only down to its
// recursion depth.
//   q [Nq, H, hd]: float32, bfloat16, float16 or float64; any strides with a contiguous last dim
//   k, v [Nk, Hkv, hd]: as q; H is a multiple of Hkv: query head h reads key head h / (H / Hkv)
//   q_positions [Nq], k_positions [Nk]: int64; neither falls inside a sequence
//   cu_seqlens_q, cu_seqlens_k [B + 1]: int32; sequence b owns rows cu[b] .. cu[b + 1] - 1
//   q_depths [Nq], k_depths [Nk]: int32; both or neither
//   key_bias [Nk]: float32 (float64 for float64), added to every scaled score of the key
//   window: at least 1, only if causal: how many positions a query sees, its own included
// Key j is visible to query i iff both belong to the same sequence, (causal) k_positions[j] <=
// q_positions[i], (if there is a window) q_positions[i] - k_positions[j] < window, and (if depths
// are given) k_depths[j] >= q_depths[i].
//   out [Nq, H, hd]: softmax over the visible keys of scale * <q_i, k_j> + key_bias_j, applied to v
//   softmax_lse [H, Nq]: float32 (float64 for float64), log of the sum of exponentials; -inf for a
//     query that sees no key, whose out is 0
// A key whose bias is -inf counts as invisible. Sums run in float32 (float64 for float64); on CUDA
// exponentials of float32 are those of ex2.approx: 2 ulp, and 0 below 2^-126. Memory beyond the
// outputs is O(rows), never O(Nq * Nk). The result is the same for any number of threads. The
// backward gives the gradients of q, k, v and key_bias; softmax_lse is not differentiable. Values
// checked on the CPU only (on CUDA undefined): cu_seqlens rise from 0 to the row count, positions
// do not fall. MoR paper, section 2.2.2 (recursion-wise caching, recursive sharing).
#pragma once

#include <optional>
#include <tuple>

#include "../operands.h"
#include "../rows.h"

namespace mor {

// The operands and options of a call.
struct DepthAttentionInputs {
  Tensor q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k;
  std::optional<Tensor> q_depths, k_depths, key_bias;
  bool causal;
  double scale;
  std::optional<int64_t> window;

  // With the layout that kernels need: rows of heads, and vectors, without gaps.
  DepthAttentionInputs contiguous() const {
    return {last_contiguous(q),
            last_contiguous(k),
            last_contiguous(v),
            as_contiguous(q_positions),
            as_contiguous(k_positions),
            as_contiguous(cu_seqlens_q),
            as_contiguous(cu_seqlens_k),
            as_contiguous(q_depths),
            as_contiguous(k_depths),
            as_contiguous(key_bias),
            causal,
            scale,
            window};
  }
};

// The operators as they are called, of kForward(inputs) and kBackward(grad_out, inputs, out,
// softmax_lse) of a device.
template <auto kForward>
std::tuple<Tensor, Tensor> call_depth_attention(Tensor q, Tensor k, Tensor v, Tensor q_positions,
                                                Tensor k_positions, Tensor cu_seqlens_q,
                                                Tensor cu_seqlens_k, std::optional<Tensor> q_depths,
                                                std::optional<Tensor> k_depths,
                                                std::optional<Tensor> key_bias, bool causal,
                                                double scale, std::optional<int64_t> window) {
  return kForward({q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, q_depths,
                   k_depths, key_bias, causal, scale, window});
}
template <auto kBackward>
std::tuple<Tensor, Tensor, Tensor, Tensor> call_depth_attention_backward(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor q_positions, Tensor k_positions, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
    std::optional<Tensor> q_depths, std::optional<Tensor> k_depths, std::optional<Tensor> key_bias,
    bool causal, double scale, std::optional<int64_t> window) {
  return kBackward(grad_out,
                   {q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, q_depths,
                    k_depths, key_bias, causal, scale, window},
                   out, softmax_lse);
}

struct DepthAttentionDims {
  int64_t num_queries;    // Nq
  int64_t num_keys;       // Nk
  int64_t num_sequences;  // B
  int64_t num_heads;      // H
  int64_t num_kv_heads;   // Hkv
  int64_t head_dim;       // hd
};

inline constexpr Operands kDepthAttentionOperands{
    "depth_attention",
    {{"q", "[Nq, H, head_dim]", "floating"},
     {"k", "[Nk, Hkv, head_dim]", "same", "k with head_dim {q[2]}"},
     {"v", "[Nk, Hkv, head_dim]", "same", "v of the shape of k {k}"},
     {"q_positions", "[Nq]", "int64"},
     {"k_positions", "[Nk]", "int64"},
     {"cu_seqlens_q", "[B + 1]", "int32"},
     {"cu_seqlens_k", "[B + 1]", "int32"},
     {"q_depths", "[Nq]", "int32"},
     {"k_depths", "[Nk]", "int32"},
     {"key_bias", "[Nk]", "sums"}}};

inline DepthAttentionDims check_depth_attention(const DepthAttentionInputs& inputs) {
  const char* op = "depth_attention";
  const auto& [q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, q_depths, k_depths,
               key_bias, causal, scale, window] = inputs;
  check_head_dim(q, 3, op);
  kDepthAttentionOperands.check({&q, &k, &v, &q_positions, &k_positions, &cu_seqlens_q,
                                 &cu_seqlens_k, pointer(q_depths), pointer(k_depths),
                                 pointer(key_bias)});
  const DepthAttentionDims dims{q.size(0), k.size(0), cu_seqlens_q.size(0) - 1,
                                q.size(1), k.size(1), q.size(2)};
  MOR_CHECK(dims.num_kv_heads > 0 && dims.num_heads % dims.num_kv_heads == 0, op, ": expected the ",
            dims.num_heads, " heads of q to be a multiple of those of k, got ", dims.num_kv_heads);
  MOR_CHECK(q_depths.has_value() == k_depths.has_value(), op,
            ": expected q_depths and k_depths together, got only ",
            q_depths.has_value() ? "q_depths" : "k_depths");
  if (window.has_value()) {
    MOR_CHECK(*window >= 1, op, ": expected a window of at least 1, got ", *window);
    MOR_CHECK(causal, op, ": expected causal with a window, got causal=False");
  }
  return dims;
}

inline constexpr Operands kDepthAttentionBackwardOperands{
    "depth_attention_backward",
    {{"q", "[Nq, H, head_dim]", "floating"},
     {"grad_out", "[Nq, H, head_dim]", "same", "grad_out of the shape of q {q}"},
     {"out", "[Nq, H, head_dim]", "same", "out of the shape of q {q}"},
     {"softmax_lse", "[H, Nq]", "sums"}}};

inline DepthAttentionDims check_depth_attention_backward(const Tensor& grad_out,
                                                         const DepthAttentionInputs& inputs,
                                                         const Tensor& out,
                                                         const Tensor& softmax_lse) {
  const auto dims = check_depth_attention(inputs);
  kDepthAttentionBackwardOperands.check({&inputs.q, &grad_out, &out, &softmax_lse});
  return dims;
}

}  // namespace mor
