#include "csrc/cpu/attention/paged_depth_attention.simd.h"

#include "csrc/cpu/attention/paged_decode.h"
#include "csrc/cpu/attention/paged_tiles.h"

namespace mor {
namespace MOR_ISA {

#if defined(__AVX512BF16__)
using BFloat16Element = uint32_t;
#else
using BFloat16Element = float;
#endif

template <class T, class E>
int64_t part(const PagedProblem& p, const PagedTask& task, float* to, char* scratch) {
  const bool few = task.rows.row_end - task.rows.row_begin <= kFewRows;
  return few ? part_rows<T, E>(p, task, to, scratch) : part_tiles<T, E>(p, task, to, scratch);
}

int64_t paged_part(const PagedProblem& p, const PagedTask& task, float* to, char* scratch) {
  switch (p.queries.dtype) {
    case ScalarType::BFloat16:
      return part<BFloat16, BFloat16Element>(p, task, to, scratch);
    case ScalarType::Half:
      return part<Half, float>(p, task, to, scratch);
    default:
      return part<float, float>(p, task, to, scratch);
  }
}

template <class T>
void merge(const PagedProblem& p, const AttentionTask& task, const float* parts, int64_t count) {
  const int64_t hd = p.queries.dims.head_dim, stride = part_stride(hd);
  const int64_t rows = task.row_end - task.row_begin, all_rows = rows * task.kv_heads;
  alignas(64) float line[kMaxHeadDim];
  for (int64_t r = 0; r < all_rows; ++r) {
    const float* row = parts + r * stride;
    const auto base_of = [&](int64_t i) { return row[i * all_rows * stride + stride - 2]; };
    float largest = base_of(0);
    for (int64_t i = 1; i < count; ++i) largest = base_of(i) > largest ? base_of(i) : largest;
    const float base = largest == -kInfinity ? 0.0f : largest;
    std::memset(line, 0, hd * sizeof(float));
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = row + i * all_rows * stride;
      const float factor = exp2_vec<6>(splat(base_of(i) - base))[0];
      sum += factor * from[stride - 1];
      for (int64_t d = 0; d < hd; ++d) line[d] += factor * from[d];
    }
    for (int64_t d = 0; d < hd; ++d) line[d] = sum != 0 ? line[d] / sum : 0;
    AttentionTask head = task;
    head.kv_head += r / rows;
    const RowIndex at = row_index(p.queries, head, task.row_begin + r % rows);
    const DepthAttentionDims& dims = p.queries.dims;
    store_row(line, hd,
              static_cast<T*>(p.queries.out_data) + (at.query * dims.num_heads + at.head) * hd);
    static_cast<float*>(p.queries.lse)[at.head * dims.num_queries + at.query] =
        log_sum(largest, sum);
  }
}

void paged_merge(const PagedProblem& p, const AttentionTask& rows, const float* parts,
                 int64_t count) {
  switch (p.queries.dtype) {
    case ScalarType::BFloat16:
      return merge<BFloat16>(p, rows, parts, count);
    case ScalarType::Half:
      return merge<Half>(p, rows, parts, count);
    default:
      return merge<float>(p, rows, parts, count);
  }
}

}  // namespace MOR_ISA
}  // namespace mor
