#include "csrc/cpu/attention/depth_attention.simd.h"

#include "csrc/cpu/attention/backward.h"
#include "csrc/cpu/attention/decode.h"
#include "csrc/cpu/attention/tiles.h"

namespace mor {
namespace MOR_ISA {

#if defined(__AVX512BF16__)
using BFloat16Element = uint32_t;
#else
using BFloat16Element = float;
#endif

template <class T, class E>
int64_t forward(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  if (task.row_end - task.row_begin <= kFewRows) return forward_rows<T, E>(p, task, scratch);
  return forward_tiles<T, E>(p, task, scratch);
}

int64_t attention_forward(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  switch (p.dtype) {
    case ScalarType::BFloat16:
      return forward<BFloat16, BFloat16Element>(p, task, scratch);
    case ScalarType::Half:
      return forward<Half, float>(p, task, scratch);
    default:
      return forward<float, float>(p, task, scratch);
  }
}

int64_t attention_backward(const AttentionProblem& p, const AttentionTask& task,
                           const KeyGradients& sums, char* scratch) {
  switch (p.dtype) {
    case ScalarType::BFloat16:
      return backward_tiles<BFloat16, BFloat16Element>(p, task, sums, scratch);
    case ScalarType::Half:
      return backward_tiles<Half, float>(p, task, sums, scratch);
    default:
      return backward_tiles<float, float>(p, task, sums, scratch);
  }
}

void attention_sum_keys(const AttentionProblem& p, int64_t sequence, int64_t kv_head,
                        const KeyGradients& sums, int64_t count, int64_t stride,
                        int64_t bias_stride) {
  switch (p.dtype) {
    case ScalarType::BFloat16:
      return sum_key_gradients<BFloat16>(p, sequence, kv_head, sums, count, stride, bias_stride);
    case ScalarType::Half:
      return sum_key_gradients<Half>(p, sequence, kv_head, sums, count, stride, bias_stride);
    default:
      return sum_key_gradients<float>(p, sequence, kv_head, sums, count, stride, bias_stride);
  }
}

}  // namespace MOR_ISA
}  // namespace mor
