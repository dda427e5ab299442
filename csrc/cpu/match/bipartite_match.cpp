#include "csrc/ops/bipartite_match.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "csrc/cpu/match/bipartite_match.simd.h"
#include "csrc/cpu/tuning.h"
#include "csrc/rows.h"

namespace mor {
namespace {

std::tuple<Tensor, Tensor> bipartite_match_cpu(const Tensor& a_in, const Tensor& b_in,
                                               const Tensor& cu_seqlens_a_in,
                                               const Tensor& cu_seqlens_b_in, std::string metric) {
  const auto dims = check_bipartite_match(a_in, b_in, cu_seqlens_a_in, cu_seqlens_b_in, metric);
  const char* op = "bipartite_match";
  const Tensor cu_seqlens_a = as_contiguous(cu_seqlens_a_in),
               cu_seqlens_b = as_contiguous(cu_seqlens_b_in);
  check_cu_seqlens_values(cu_seqlens_a, dims.num_a, op, "cu_seqlens_a");
  check_cu_seqlens_values(cu_seqlens_b, dims.num_b, op, "cu_seqlens_b");
  const Rows a = contiguous_rows(a_in), b = contiguous_rows(b_in);
  const bool is_double = a_in.scalar_type() == ScalarType::Double;
  Tensor scores =
      new_tensor(a_in, {dims.num_a}, is_double ? ScalarType::Double : ScalarType::Float);
  Tensor index = new_tensor(a_in, {dims.num_a}, ScalarType::Long);
  const BipartiteMatch match{a_in.scalar_type(),
                             dims.width,
                             dims.cosine,
                             a.data,
                             a.stride,
                             b.data,
                             b.stride,
                             scores.mutable_data_ptr(),
                             index.mutable_data_ptr<int64_t>()};
  const int32_t *cu_a = cu_seqlens_a.const_data_ptr<int32_t>(),
                *cu_b = cu_seqlens_b.const_data_ptr<int32_t>();
  const int64_t task_rows = match_task_rows(dims.width);
  std::vector<MatchTask> tasks;
  int64_t work = 0;  // multiplications
  for (int64_t s = 0; s < dims.num_sequences; ++s) {
    for (int64_t row = cu_a[s]; row < cu_a[s + 1]; row += task_rows) {
      tasks.push_back({row, std::min<int64_t>(row + task_rows, cu_a[s + 1]), cu_b[s], cu_b[s + 1]});
      work += (tasks.back().a_end - row) * (cu_b[s + 1] - cu_b[s]) * dims.width;
    }
  }
  const auto num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t grain =
      std::max<int64_t>(kProductsPerThread * num_tasks / std::max<int64_t>(work, 1), 1);
  const auto run = MOR_BEST(match_rows);
  const int64_t scratch_bytes = MOR_BEST(match_scratch)(match, task_rows);
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
    struct alignas(64) Line {
      char bytes[64];
    };
    const std::unique_ptr<Line[]> scratch(new Line[scratch_bytes / 64 + 1]);
    for (int64_t t = begin; t < end; ++t) run(match, tasks[t], scratch.get());
  });
  return {scores, index};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&mor::bipartite_match_cpu));
}
