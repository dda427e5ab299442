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

#include "../checks.h"
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

inline DepthAttentionDims check_depth_attention(const DepthAttentionInputs& inputs) {
  const char* op = "depth_attention";
  const auto& [q, k, v, q_positions, k_positions, cu_seqlens_q, cu_seqlens_k, q_depths, k_depths,
               key_bias, causal, scale, window] = inputs;
  check_dim(q, 3, op, "q", "[Nq, H, head_dim]");
  check_dim(k, 3, op, "k", "[Nk, Hkv, head_dim]");
  check_dim(v, 3, op, "v", "[Nk, Hkv, head_dim]");
  check_floating(q, op, "q");
  check_dtype(k, q.scalar_type(), op, "k");
  check_dtype(v, q.scalar_type(), op, "v");
  check_same_device(k, q, op, "k");
  check_same_device(v, q, op, "v");
  check_dim(cu_seqlens_q, 1, op, "cu_seqlens_q", "[B + 1]");
  const DepthAttentionDims dims{q.size(0), k.size(0), cu_seqlens_q.size(0) - 1,
                                q.size(1), k.size(1), q.size(2)};
  MOR_CHECK(dims.head_dim >= 1 && dims.head_dim <= 256, op, ": expected head_dim in 1..256, got ",
            dims.head_dim);
  MOR_CHECK(k.size(2) == dims.head_dim, op, ": expected k with head_dim ", dims.head_dim, ", got ",
            shape_str(k));
  MOR_CHECK(
      v.size(0) == dims.num_keys && v.size(1) == dims.num_kv_heads && v.size(2) == dims.head_dim,
      op, ": expected v of the shape of k ", shape_str(k), ", got ", shape_str(v));
  MOR_CHECK(dims.num_kv_heads > 0 && dims.num_heads % dims.num_kv_heads == 0, op, ": expected the ",
            dims.num_heads, " heads of q to be a multiple of those of k, got ", dims.num_kv_heads);
  const auto check_vector = [&](const Tensor& t, int64_t size, ScalarType dtype, const char* name,
                                const char* shape) {
    check_dim(t, 1, op, name, shape);
    check_dtype(t, dtype, op, name);
    check_same_device(t, q, op, name);
    MOR_CHECK(t.size(0) == size, op, ": expected ", name, " of ", size, " elements, got ",
              shape_str(t));
  };
  check_vector(q_positions, dims.num_queries, ScalarType::Long, "q_positions", "[Nq]");
  check_vector(k_positions, dims.num_keys, ScalarType::Long, "k_positions", "[Nk]");
  MOR_CHECK(dims.num_sequences >= 0, op, ": expected cu_seqlens_q of at least one element, got ",
            shape_str(cu_seqlens_q));
  check_vector(cu_seqlens_q, dims.num_sequences + 1, ScalarType::Int, "cu_seqlens_q", "[B + 1]");
  check_vector(cu_seqlens_k, dims.num_sequences + 1, ScalarType::Int, "cu_seqlens_k", "[B + 1]");
  MOR_CHECK(q_depths.has_value() == k_depths.has_value(), op,
            ": expected q_depths and k_depths together, got only ",
            q_depths.has_value() ? "q_depths" : "k_depths");
  if (q_depths.has_value()) {
    check_vector(*q_depths, dims.num_queries, ScalarType::Int, "q_depths", "[Nq]");
    check_vector(*k_depths, dims.num_keys, ScalarType::Int, "k_depths", "[Nk]");
  }
  if (key_bias.has_value()) {
    check_vector(*key_bias, dims.num_keys,
                 q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float,
                 "key_bias", "[Nk]");
  }
  if (window.has_value()) {
    MOR_CHECK(*window >= 1, op, ": expected a window of at least 1, got ", *window);
    MOR_CHECK(causal, op, ": expected causal with a window, got causal=False");
  }
  return dims;
}

inline DepthAttentionDims check_depth_attention_backward(const Tensor& grad_out,
                                                         const DepthAttentionInputs& inputs,
                                                         const Tensor& out,
                                                         const Tensor& softmax_lse) {
  const char* op = "depth_attention_backward";
  const auto dims = check_depth_attention(inputs);
  const Tensor& q = inputs.q;
  const auto check_like_q = [&](const Tensor& t, const char* name) {
    check_dim(t, 3, op, name, "[Nq, H, head_dim]");
    check_dtype(t, q.scalar_type(), op, name);
    check_same_device(t, q, op, name);
    MOR_CHECK(t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2), op,
              ": expected ", name, " of the shape of q ", shape_str(q), ", got ", shape_str(t));
  };
  check_like_q(grad_out, "grad_out");
  check_like_q(out, "out");
  check_dim(softmax_lse, 2, op, "softmax_lse", "[H, Nq]");
  check_dtype(softmax_lse,
              q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float, op,
              "softmax_lse");
  check_same_device(softmax_lse, q, op, "softmax_lse");
  MOR_CHECK(softmax_lse.size(0) == dims.num_heads && softmax_lse.size(1) == dims.num_queries, op,
            ": expected softmax_lse of shape [", dims.num_heads, ", ", dims.num_queries, "], got ",
            shape_str(softmax_lse));
  return dims;
}

}  // namespace mor
