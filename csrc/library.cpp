// Every schema on one screen; implementations register themselves at the foot of their files.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/bipartite_match.h"
#include "ops/depth_attention.h"
#include "ops/group_rows.h"
#include "ops/packed_linear.h"
#include "ops/paged_depth_attention.h"
#include "ops/route_threshold.h"
#include "ops/route_topk.h"
#include "ops/segment_reduce.h"

namespace {

#if !defined(MOR_CUDA_ARCHITECTURES)
#define MOR_CUDA_ARCHITECTURES ""
#endif
std::string cuda_architectures() { return MOR_CUDA_ARCHITECTURES; }

// What csrc/ops says of the operands, for the checks of fake tensors.
std::string operands() {
  std::string all;
  for (const mor::Operands* of :
       {&mor::kBipartiteMatchOperands, &mor::kDepthAttentionOperands,
        &mor::kDepthAttentionBackwardOperands, &mor::kGatherTokensOperands,
        &mor::kGatherTokensBackwardOperands, &mor::kGroupRowsOperands, &mor::kKvAppendOperands,
        &mor::kKvGatherOperands, &mor::kPackedLinearOperands, &mor::kPagedDepthAttentionOperands,
        &mor::kRouteThresholdOperands, &mor::kRouteTopkOperands, &mor::kScatterTokensOperands,
        &mor::kScatterTokensInPlaceOperands, &mor::kScatterTokensBackwardOperands,
        &mor::kSegmentReduceOperands, &mor::kSegmentReduceAmaxBackwardOperands})
    all += (all.empty() ? "" : "\n\n") + of->text();
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY(mor, m) {
  m.def(
      "route_topk(Tensor scores, SymInt k, Tensor? k_each, Tensor cu_seqlens, SymInt num_rows, "
      "Tensor? candidates, Tensor? protected_rows, bool by_score) -> Tensor");
  m.def(
      "route_threshold(Tensor scores, float threshold, Tensor? threshold_each, Tensor cu_seqlens, "
      "str kind, bool inclusive, SymInt min_k, SymInt max_k, Tensor? candidates, SymInt? max_rows) "
      "-> (Tensor rows, Tensor cu_seqlens)");
  m.def(
      "group_rows(Tensor keys, SymInt num_keys, Tensor? cu_seqlens) -> (Tensor rows, Tensor "
      "offsets)");

  m.def("gather_tokens(Tensor x, Tensor rows) -> Tensor");
  m.def("gather_tokens_backward(Tensor grad, Tensor rows, SymInt num_rows) -> Tensor");

  m.def(
      "scatter_tokens(Tensor base, Tensor updates, Tensor rows, Tensor? gate, Tensor? base_scale) "
      "-> Tensor");
  m.def(
      "scatter_tokens_(Tensor(a!) base, Tensor updates, Tensor rows, Tensor? gate, Tensor? "
      "base_scale) -> ()");
  // base asks for the gradient of base_scale, updates for that of gate; what is not asked for comes
  // back empty.
  m.def(
      "scatter_tokens_backward(Tensor grad, Tensor? base, Tensor? updates, Tensor rows, Tensor? "
      "gate, Tensor? base_scale, bool need_base, bool need_updates) "
      "-> (Tensor grad_base, Tensor grad_updates, Tensor grad_gate, Tensor grad_base_scale)");

  m.def(
      "segment_reduce(Tensor x, Tensor segments, SymInt num_segments, str reduce, Tensor? weights) "
      "-> (Tensor out, Tensor totals)");
  m.def(
      "segment_reduce_amax_backward(Tensor grad, Tensor x, Tensor out, Tensor segments) -> Tensor");

  m.def(
      "bipartite_match(Tensor a, Tensor b, Tensor cu_seqlens_a, Tensor cu_seqlens_b, str metric) "
      "-> (Tensor scores, Tensor index)");

  m.def(
      "depth_attention(Tensor q, Tensor k, Tensor v, Tensor q_positions, Tensor k_positions, "
      "Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? q_depths, Tensor? k_depths, Tensor? key_bias, bool causal, "
      "float scale, int? window=None) "
      "-> (Tensor out, Tensor softmax_lse)");
  m.def(
      "depth_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "softmax_lse, "
      "Tensor q_positions, Tensor k_positions, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? "
      "q_depths, "
      "Tensor? k_depths, Tensor? key_bias, bool causal, float scale, int? window=None) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_key_bias)");

  m.def(
      "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping) "
      "-> ()");
  m.def(
      "kv_gather(Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, SymInt "
      "num_rows) -> (Tensor k, Tensor v, Tensor cu_seqlens)");
  m.def(
      "paged_depth_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor "
      "context_lens, Tensor cu_seqlens_q, Tensor? context_starts, float scale) "
      "-> (Tensor out, Tensor softmax_lse)");

  m.def("packed_linear(Tensor x, Tensor packed, SymInt num_outputs, Tensor? bias) -> Tensor");

  m.def("instruction_set(str force) -> str");
  m.def("cuda_architectures() -> str");
  m.def("operands() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mor, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("operands", TORCH_BOX(&operands));
}
