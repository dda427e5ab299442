#include "../../../kernels/attention/depth_attention_backward.cuh"
#include "../../../kernels/attention/depth_attention_forward.cuh"
#include "binding.h"

namespace {

// Filled by test_simt_depth_attention.py; the pointers are of the dtype, or of float or double.
struct Arguments {
  const void *q, *k, *v, *q_positions, *k_positions, *cu_seqlens_q, *cu_seqlens_k, *q_depths,
      *k_depths, *key_bias, *grad_out, *forward_out;
  void *key_ranges, *out, *lse, *delta, *grad_q, *grad_k, *grad_v, *grad_bias_parts, *grad_key_bias;
  int64_t strides[10];  // row and head of q, k, v, grad_out, forward_out
  int64_t num_queries, num_keys, num_sequences, num_heads, num_kv_heads, head_dim, causal, aligned,
      window;
  double scale;
};

template <class T>
mor::DepthAttention<T> typed(const Arguments& a) {
  using Acc = mor::acc_t<T>;
  const auto operand = [&](const void* data, int i) {
    return mor::AttentionOperand<T>{static_cast<const T*>(data), a.strides[2 * i],
                                    a.strides[2 * i + 1]};
  };
  mor::DepthAttention<T> p{};
  p.q = operand(a.q, 0), p.k = operand(a.k, 1), p.v = operand(a.v, 2);
  p.grad_out = operand(a.grad_out, 3), p.forward_out = operand(a.forward_out, 4);
  p.q_positions = static_cast<const int64_t*>(a.q_positions);
  p.k_positions = static_cast<const int64_t*>(a.k_positions);
  p.cu_seqlens_q = static_cast<const int32_t*>(a.cu_seqlens_q);
  p.cu_seqlens_k = static_cast<const int32_t*>(a.cu_seqlens_k);
  p.q_depths = static_cast<const int32_t*>(a.q_depths);
  p.k_depths = static_cast<const int32_t*>(a.k_depths);
  p.key_bias = static_cast<const Acc*>(a.key_bias);
  p.num_queries = a.num_queries, p.num_keys = a.num_keys;
  p.num_sequences = int(a.num_sequences), p.num_heads = int(a.num_heads);
  p.num_kv_heads = int(a.num_kv_heads), p.head_dim = int(a.head_dim);
  p.causal = a.causal != 0, p.aligned = a.aligned != 0, p.scale = Acc(a.scale);
  p.window = a.window, p.key_ranges = static_cast<mor::KeyRange*>(a.key_ranges);
  p.out = static_cast<T*>(a.out), p.lse = static_cast<Acc*>(a.lse);
  p.delta = static_cast<Acc*>(a.delta);
  p.grad_q = static_cast<T*>(a.grad_q), p.grad_k = static_cast<T*>(a.grad_k);
  p.grad_v = static_cast<T*>(a.grad_v);
  p.grad_bias_parts = static_cast<Acc*>(a.grad_bias_parts);
  p.grad_key_bias = static_cast<Acc*>(a.grad_key_bias);
  return p;
}

}  // namespace

SIMT_EXPORT int depth_attention(int64_t dtype, const Arguments* a) {
  return simt::guarded([&] {
    return simt::dispatch_floating(
        dtype, [&]<class T>(T) { return mor::launch_depth_attention(typed<T>(*a), nullptr); });
  });
}

SIMT_EXPORT int depth_attention_backward(int64_t dtype, const Arguments* a) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      return mor::launch_depth_attention_backward(typed<T>(*a), nullptr);
    });
  });
}
