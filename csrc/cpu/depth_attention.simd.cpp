#include "depth_attention.simd.h"

#include "depth_attention.forward.h"

namespace mor {
namespace MOR_ISA {

#if defined(__AVX512BF16__)
using BFloat16Element = uint32_t;
#else
using BFloat16Element = float;
#endif

int64_t attention_forward(const AttentionProblem& p, const AttentionTask& task, char* scratch) {
  switch (p.dtype) {
    case ScalarType::BFloat16:
      return forward_tiles<BFloat16, BFloat16Element>(p, task, scratch);
    case ScalarType::Half:
      return forward_tiles<Half, float>(p, task, scratch);
    default:
      return forward_tiles<float, float>(p, task, scratch);
  }
}

}  // namespace MOR_ISA
}  // namespace mor
