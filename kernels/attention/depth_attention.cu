#include "../../csrc/ops/depth_attention.h"

#include <optional>
#include <tuple>

#include "../glue.h"
#include "depth_attention_backward.cuh"
#include "depth_attention_forward.cuh"

namespace mor {
namespace {

template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
AttentionOperand<T> operand(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

// Whether 16-byte accesses of the rows are possible.
bool is_aligned(const Tensor& t) {
  const int64_t size = t.element_size();
  return (reinterpret_cast<uintptr_t>(t.const_data_ptr()) | uintptr_t(t.stride(0) * size) |
          uintptr_t(t.stride(1) * size) | uintptr_t(t.size(2) * size)) %
             16 ==
         0;
}

template <class T>
DepthAttention<T> problem(const DepthAttentionDims& dims, const DepthAttentionInputs& in,
                          const Tensor& key_ranges) {
  DepthAttention<T> p{};
  p.q = operand<T>(in.q), p.k = operand<T>(in.k), p.v = operand<T>(in.v);
  p.q_positions = in.q_positions.const_data_ptr<int64_t>();
  p.k_positions = in.k_positions.const_data_ptr<int64_t>();
  p.cu_seqlens_q = in.cu_seqlens_q.const_data_ptr<int32_t>();
  p.cu_seqlens_k = in.cu_seqlens_k.const_data_ptr<int32_t>();
  p.q_depths = data<int32_t>(in.q_depths), p.k_depths = data<int32_t>(in.k_depths);
  p.key_bias = data<acc_t<T>>(in.key_bias);
  p.num_queries = dims.num_queries, p.num_keys = dims.num_keys;
  p.num_sequences = int(dims.num_sequences), p.num_heads = int(dims.num_heads);
  p.num_kv_heads = int(dims.num_kv_heads), p.head_dim = int(dims.head_dim);
  p.causal = in.causal, p.scale = acc_t<T>(in.scale), p.window = in.window.value_or(0);
  p.key_ranges = static_cast<KeyRange*>(key_ranges.mutable_data_ptr());
  p.aligned = is_aligned(in.q) && is_aligned(in.k) && is_aligned(in.v);
  return p;
}

ScalarType acc_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> depth_attention_cuda(const DepthAttentionInputs& given) {
  const auto dims = check_depth_attention(given);
  const DeviceGuard guard(given.q.get_device_index());
  const DepthAttentionInputs in = given.contiguous();
  const Tensor& q = in.q;
  Tensor out = new_tensor(q, {dims.num_queries, dims.num_heads, dims.head_dim});
  Tensor lse = new_tensor(q, {dims.num_heads, dims.num_queries}, acc_dtype(q));
  const Tensor key_ranges = new_tensor(q, {dims.num_queries, 2}, ScalarType::Int);
  dispatch_floating_cuda(q.scalar_type(), [&]<class T>(T) {
    auto p = problem<T>(dims, in, key_ranges);
    p.out = static_cast<T*>(out.mutable_data_ptr());
    p.lse = static_cast<acc_t<T>*>(lse.mutable_data_ptr());
    check_launch(launch_depth_attention(p, current_stream(q)), "depth_attention");
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depth_attention_backward_cuda(
    const Tensor& grad_out_in, const DepthAttentionInputs& given, const Tensor& out_in,
    const Tensor& lse_in) {
  const auto dims = check_depth_attention_backward(grad_out_in, given, out_in, lse_in);
  const DeviceGuard guard(given.q.get_device_index());
  const DepthAttentionInputs in = given.contiguous();
  const Tensor& q = in.q;
  const Tensor grad_out = last_contiguous(grad_out_in), out = last_contiguous(out_in);
  const Tensor lse = as_contiguous(lse_in);
  const ScalarType acc = acc_dtype(q);
  const auto scratch = [&](int64_t rows, int64_t columns) {
    return new_tensor(q, {rows, columns}, acc);
  };
  const bool bias = in.key_bias.has_value();
  Tensor grad_q = new_tensor(q, {dims.num_queries, dims.num_heads, dims.head_dim});
  Tensor grad_k = new_tensor(q, {dims.num_keys, dims.num_kv_heads, dims.head_dim});
  Tensor grad_v = new_tensor(q, {dims.num_keys, dims.num_kv_heads, dims.head_dim});
  Tensor grad_key_bias = new_tensor(q, {bias ? dims.num_keys : 0}, acc);
  const Tensor delta = scratch(dims.num_heads, dims.num_queries);
  const Tensor parts = scratch(bias ? dims.num_kv_heads : 0, dims.num_keys);
  const Tensor key_ranges = new_tensor(q, {dims.num_queries, 2}, ScalarType::Int);
  dispatch_floating_cuda(q.scalar_type(), [&]<class T>(T) {
    using Acc = acc_t<T>;
    auto p = problem<T>(dims, in, key_ranges);
    p.grad_out = operand<T>(grad_out), p.forward_out = operand<T>(out);
    p.aligned = p.aligned && is_aligned(grad_out);
    p.lse = static_cast<Acc*>(const_cast<void*>(lse.const_data_ptr()));
    p.delta = static_cast<Acc*>(delta.mutable_data_ptr());
    p.grad_q = static_cast<T*>(grad_q.mutable_data_ptr());
    p.grad_k = static_cast<T*>(grad_k.mutable_data_ptr());
    p.grad_v = static_cast<T*>(grad_v.mutable_data_ptr());
    p.grad_bias_parts = static_cast<Acc*>(parts.mutable_data_ptr());
    p.grad_key_bias = static_cast<Acc*>(grad_key_bias.mutable_data_ptr());
    check_launch(launch_depth_attention_backward(p, current_stream(q)), "depth_attention_backward");
  });
  return {grad_q, grad_k, grad_v, grad_key_bias};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("depth_attention", TORCH_BOX(&mor::call_depth_attention<mor::depth_attention_cuda>));
  m.impl("depth_attention_backward",
         TORCH_BOX(&mor::call_depth_attention_backward<mor::depth_attention_backward_cuda>));
}
