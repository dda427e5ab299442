#include "csrc/cpu/attention/depth_attention.simd.h"

#include "csrc/cpu/attention/backward.h"
#include "csrc/cpu/attention/decode.h"
#include "csrc/cpu/attention/tiles.h"

namespace mor {
namespace MOR_ISA {

template <class T, class E>
int64_t forward(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  const int64_t rows = task.row_end - task.row_begin, hd = p.dims.head_dim;
  Arena arena{scratch};
  ListedKeys keys(p, task.sequence, rows, arena);
  if (scratch) keys.list_for(task);
  const auto write = [&](int64_t r, float* line, float base, float sum) {
    AttentionTask head = task;
    head.kv_head += r / rows;
    const RowIndex at = row_index(p, head, task.row_begin + r % rows);
    if (sum == 0) std::memset(line, 0, hd * sizeof(float));  // sees nothing; may be 0 * inf
    store_row(line, hd, static_cast<T*>(p.out_data) + (at.query * p.dims.num_heads + at.head) * hd,
              sum != 0 ? 1 / sum : 1);
    static_cast<float*>(p.lse)[at.head * p.dims.num_queries + at.query] = log_sum(base, sum);
  };
  if (rows <= kFewRows) attend_rows<T, E>(p, task, keys, arena, write);
  else attend_tiles<T, E>(p, task, keys, arena, write);
  return arena.used;
}

int64_t attention_forward(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  return dispatch_elements(p.dtype,
                           [&]<class T, class E>() { return forward<T, E>(p, task, scratch); });
}

int64_t attention_backward(const AttentionProblem& p, const AttentionTask& task,
                           const KeyGradients& sums, char* scratch) {
  return dispatch_elements(
      p.dtype, [&]<class T, class E>() { return backward_tiles<T, E>(p, task, sums, scratch); });
}

void attention_sum_keys(const AttentionProblem& p, int64_t sequence, int64_t kv_head,
                        const KeyGradients& sums, int64_t count, int64_t stride,
                        int64_t bias_stride) {
  dispatch_elements(p.dtype, [&]<class T, class E>() {
    sum_key_gradients<T>(p, sequence, kv_head, sums, count, stride, bias_stride);
  });
}

}  // namespace MOR_ISA
}  // namespace mor
