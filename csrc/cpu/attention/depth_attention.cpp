#include "csrc/ops/depth_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "csrc/cpu/attention/depth_attention.simd.h"
#include "csrc/cpu/attention/float64.h"
#include "csrc/cpu/memory/arena.h"
#include "csrc/cpu/memory/output_cache.h"

namespace mor {
namespace {

AttentionOperand operand(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

AttentionProblem problem(const DepthAttentionDims& dims, const DepthAttentionInputs& in) {
  AttentionProblem p{};
  p.dims = dims;
  p.dtype = in.q.scalar_type();
  p.group = dims.num_heads / dims.num_kv_heads;
  p.q = operand(in.q), p.k = operand(in.k), p.v = operand(in.v);
  p.q_positions = in.q_positions.const_data_ptr<int64_t>();
  p.k_positions = in.k_positions.const_data_ptr<int64_t>();
  p.cu_q = in.cu_seqlens_q.const_data_ptr<int32_t>();
  p.cu_k = in.cu_seqlens_k.const_data_ptr<int32_t>();
  if (in.q_depths.has_value()) {
    p.q_depths = in.q_depths->const_data_ptr<int32_t>();
    p.k_depths = in.k_depths->const_data_ptr<int32_t>();
  }
  if (in.key_bias.has_value()) p.key_bias = in.key_bias->const_data_ptr();
  p.causal = in.causal, p.scale = in.scale, p.window = in.window.value_or(0);
  return p;
}

void check_positions(const int64_t* positions, const int32_t* cu, int64_t num_sequences,
                     const char* name) {
  for (int64_t b = 0; b < num_sequences; ++b) {
    for (int64_t i = cu[b] + 1; i < cu[b + 1]; ++i) {
      MOR_CHECK(positions[i] >= positions[i - 1], "depth_attention: expected ", name,
                " that do not fall inside a sequence, got ", name, "[", i, "] = ", positions[i],
                " after ", positions[i - 1]);
    }
  }
}

void check_values(const AttentionProblem& p, const DepthAttentionInputs& in) {
  check_cu_seqlens_values(in.cu_seqlens_q, p.dims.num_queries, "depth_attention", "cu_seqlens_q");
  check_cu_seqlens_values(in.cu_seqlens_k, p.dims.num_keys, "depth_attention", "cu_seqlens_k");
  check_positions(p.q_positions, p.cu_q, p.dims.num_sequences, "q_positions");
  check_positions(p.k_positions, p.cu_k, p.dims.num_sequences, "k_positions");
}

void scalar_forward(const AttentionProblem& p) {
  const int64_t heads = p.dims.num_heads;
  for (int64_t b = 0; b < p.dims.num_sequences; ++b) {
    torch::stable::parallel_for(
        p.cu_q[b] * heads, p.cu_q[b + 1] * heads, 16, [&](int64_t begin, int64_t end) {
          std::vector<double> scores;
          for (int64_t row = begin; row < end; ++row)
            scalar_attention_row<double>(p, b, row / heads, row % heads, scores);
        });
  }
}

// Tasks of every sequence and `heads` key heads, cut into pieces of at most `rows` rows.
struct TaskList {
  const AttentionProblem& p;
  int64_t rows, heads, head_tasks;
  std::vector<int64_t> first;  // task of each sequence

  TaskList(const AttentionProblem& problem, int64_t rows_of_task, int64_t heads_of_task = 1)
      : p(problem), rows(rows_of_task), heads(heads_of_task), first(p.dims.num_sequences + 1, 0) {
    head_tasks = (p.dims.num_kv_heads + heads - 1) / heads;
    for (int64_t b = 0; b < p.dims.num_sequences; ++b) {
      const int64_t pieces = (sequence_rows(b) + rows - 1) / rows;
      first[b + 1] = first[b] + pieces * head_tasks;
    }
  }

  int64_t size() const { return first.back(); }
  int64_t sequence_rows(int64_t b) const { return (p.cu_q[b + 1] - p.cu_q[b]) * p.group; }

  AttentionTask operator[](int64_t i) const {
    const int64_t b = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
    const int64_t head = (i - first[b]) % head_tasks * heads,
                  begin = (i - first[b]) / head_tasks * rows;
    return {b, head, std::min(heads, p.dims.num_kv_heads - head), begin,
            std::min(begin + rows, sequence_rows(b))};
  }

  // Calls body(task number, scratch of `bytes`) for every task. Threads take them in turn from a
  // counter, the later rows, which see more keys, first; which thread does a task changes nothing
  // in its result.
  template <class Body>
  void run(int64_t bytes, Body&& body) const {
    double products = 0;
    const int64_t window = p.window == 0 ? p.dims.num_keys : p.window;
    for (int64_t b = 0; b < p.dims.num_sequences; ++b)
      products += 1.0 * sequence_rows(b) * std::min<int64_t>(p.cu_k[b + 1] - p.cu_k[b], window);
    products *= p.dims.num_kv_heads * p.dims.head_dim;
    // Waking threads costs some microseconds, as much as about this many products.
    int64_t threads = products < 2e5 ? 1 : torch::stable::get_num_threads();
    threads = std::min(threads, size());
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      const Scratch scratch = allocate(bytes);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < size();)
        body(size() - 1 - i, scratch.get());
    });
  }
};

int64_t most_rows(const AttentionProblem& p) {
  int64_t most = 0;
  for (int64_t b = 0; b < p.dims.num_sequences; ++b)
    most = std::max(most, (p.cu_q[b + 1] - p.cu_q[b]) * p.group);
  return most;
}

void tiled_forward(const AttentionProblem& p) {
  const int64_t most = most_rows(p);
  int64_t heads = most <= kFewRows ? p.dims.num_kv_heads : 1;
  const int64_t enough = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  while (heads > 1 && p.dims.num_sequences * (p.dims.num_kv_heads / heads) < enough) heads /= 2;
  int64_t rows = kForwardRows;
  // Sequences of up to kLeastRows rows are not cut in any case.
  while (most > kLeastRows && rows > kLeastRows && TaskList(p, rows, heads).size() < kEnoughTasks)
    rows /= 2;
  const TaskList tasks(p, rows, heads);
  const auto kernel = MOR_BEST(attention_forward);
  int64_t bytes = 0;
  for (int64_t i = 0; i < tasks.size(); ++i) bytes = std::max(bytes, kernel(p, tasks[i], nullptr));
  tasks.run(bytes, [&](int64_t i, char* scratch) { kernel(p, tasks[i], scratch); });
}

// The sums over queries of the gradients of the keys are the backward's one obstacle to more tasks
// than sequences times key heads. With too few of those, the rows of a sequence are cut into pieces
// with sums of their own, added up in a fixed order afterwards: a choice by shape, never by
// threads.
void tiled_backward(const AttentionProblem& p) {
  const DepthAttentionDims& dims = p.dims;
  const int64_t heads = std::max<int64_t>(dims.num_sequences * dims.num_kv_heads, 1);
  const int64_t wanted = (kEnoughTasks + heads - 1) / heads;
  const int64_t steps = (most_rows(p) + kBackwardRows - 1) / kBackwardRows;
  const int64_t steps_of_task = std::max<int64_t>((steps + wanted - 1) / wanted, 1);
  const int64_t pieces = (steps + steps_of_task - 1) / steps_of_task;
  const TaskList tasks(p, steps_of_task * kBackwardRows);

  const int64_t bias_stride = dims.num_kv_heads * dims.num_keys;
  const int64_t row = (dims.head_dim + 15) / 16 * 16, stride = bias_stride * row;
  const int64_t floats = 2 * stride + (p.key_bias ? bias_stride : 0);
  // At least one piece: a sequence without queries has its bias gradient's zeros written there.
  const Scratch memory = allocate(std::max<int64_t>(pieces, 1) * floats * sizeof(float));
  float* const grad_k = reinterpret_cast<float*>(memory.get());
  const KeyGradients all{grad_k, grad_k + pieces * stride, grad_k + 2 * pieces * stride};
  const auto sums_of = [&](int64_t b, int64_t g, int64_t piece) -> KeyGradients {
    const int64_t at = (piece * dims.num_kv_heads + g) * dims.num_keys + p.cu_k[b];
    return {all.k + at * row, all.v + at * row, all.bias + at};
  };

  const auto kernel = MOR_BEST(attention_backward);
  int64_t bytes = 0;
  for (int64_t i = 0; i < tasks.size(); ++i)
    bytes = std::max(bytes, kernel(p, tasks[i], all, nullptr));
  tasks.run(bytes, [&](int64_t i, char* scratch) {
    const AttentionTask task = tasks[i];
    kernel(p, task, sums_of(task.sequence, task.kv_head, task.row_begin / tasks.rows), scratch);
  });

  const auto sum_keys = MOR_BEST(attention_sum_keys);
  torch::stable::parallel_for(
      0, dims.num_sequences * dims.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / dims.num_kv_heads, g = i % dims.num_kv_heads;
          const int64_t count = (tasks.sequence_rows(b) + tasks.rows - 1) / tasks.rows;
          sum_keys(p, b, g, sums_of(b, g, 0), count, stride, bias_stride);
        }
      });
  for (int64_t j = 0; p.key_bias && j < dims.num_keys; ++j) {
    float sum = 0;
    for (int64_t g = 0; g < dims.num_kv_heads; ++g) sum += all.bias[g * dims.num_keys + j];
    static_cast<float*>(p.grad_key_bias)[j] = sum;
  }
}

void scalar_backward(const AttentionProblem& p) {
  const int64_t kv_heads = p.dims.num_kv_heads, num_keys = p.dims.num_keys;
  std::vector<double> bias(p.key_bias ? kv_heads * num_keys : 0, 0.0);
  torch::stable::parallel_for(
      0, p.dims.num_sequences * kv_heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t g = i % kv_heads;
          scalar_attention_backward<double>(p, i / kv_heads, g,
                                            bias.data() + (p.key_bias ? g * num_keys : 0));
        }
      });
  for (int64_t j = 0; p.key_bias && j < num_keys; ++j) {
    double sum = 0;
    for (int64_t g = 0; g < kv_heads; ++g) sum += bias[g * num_keys + j];
    static_cast<double*>(p.grad_key_bias)[j] = sum;
  }
}

std::tuple<Tensor, Tensor> depth_attention_cpu(const DepthAttentionInputs& given) {
  const auto dims = check_depth_attention(given);
  const DepthAttentionInputs in = given.contiguous();
  const Tensor& q = in.q;
  AttentionProblem p = problem(dims, in);
  check_values(p, in);
  const bool is_double = q.scalar_type() == ScalarType::Double;
  Tensor out = new_result(q, {dims.num_queries, dims.num_heads, dims.head_dim});
  Tensor lse = new_tensor(q, {dims.num_heads, dims.num_queries},
                          is_double ? ScalarType::Double : ScalarType::Float);
  p.out_data = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  if (is_double) scalar_forward(p);
  else tiled_forward(p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depth_attention_backward_cpu(
    const Tensor& grad_out_in, const DepthAttentionInputs& given, const Tensor& out_in,
    const Tensor& lse_in) {
  const auto dims = check_depth_attention_backward(grad_out_in, given, out_in, lse_in);
  const DepthAttentionInputs in = given.contiguous();
  const Tensor& q = in.q;
  AttentionProblem p = problem(dims, in);
  check_values(p, in);
  const Tensor grad_out = last_contiguous(grad_out_in), out = last_contiguous(out_in);
  const Tensor lse = as_contiguous(lse_in);
  p.grad_out = operand(grad_out), p.out = operand(out);
  p.lse = const_cast<void*>(lse.const_data_ptr());
  Tensor grad_q = new_result(q, {dims.num_queries, dims.num_heads, dims.head_dim});
  Tensor grad_k = new_result(q, {dims.num_keys, dims.num_kv_heads, dims.head_dim});
  Tensor grad_v = new_result(q, {dims.num_keys, dims.num_kv_heads, dims.head_dim});
  Tensor grad_key_bias =
      new_tensor(q, {in.key_bias.has_value() ? dims.num_keys : 0}, lse.scalar_type());
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr(), p.grad_key_bias = grad_key_bias.mutable_data_ptr();
  if (q.scalar_type() == ScalarType::Double) scalar_backward(p);
  else tiled_backward(p);
  return {grad_q, grad_k, grad_v, grad_key_bias};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("depth_attention", TORCH_BOX(&mor::call_depth_attention<mor::depth_attention_cpu>));
  m.impl("depth_attention_backward",
         TORCH_BOX(&mor::call_depth_attention_backward<mor::depth_attention_backward_cpu>));
}
