#include "csrc/cpu/attention/paged_depth_attention.simd.h"

#include "csrc/cpu/attention/decode.h"
#include "csrc/cpu/attention/paged_keys.h"
#include "csrc/cpu/attention/tiles.h"

namespace mor {
namespace MOR_ISA {

template <class T, class E>
int64_t part(const PagedProblem& p, const PagedTask& task, float* to, char* scratch) {
  const int64_t hd = p.queries.dims.head_dim;
  Arena arena{scratch};
  PagedKeys keys(p, task, arena);
  const auto write = [&](int64_t r, const float* line, float base, float sum) {
    float* row = to + r * part_stride(hd);
    std::memcpy(row, line, hd * sizeof(float));
    row[part_stride(hd) - 2] = base, row[part_stride(hd) - 1] = sum;
  };
  if (task.rows.row_end - task.rows.row_begin <= kFewRows)
    attend_rows<T, E>(p.queries, task.rows, keys, arena, write);
  else attend_tiles<T, E>(p.queries, task.rows, keys, arena, write);
  return arena.used;
}

int64_t paged_part(const PagedProblem& p, const PagedTask& task, float* to, char* scratch) {
  return dispatch_elements(p.queries.dtype,
                           [&]<class T, class E>() { return part<T, E>(p, task, to, scratch); });
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
  dispatch_elements(p.queries.dtype, [&]<class T, class E>() { merge<T>(p, rows, parts, count); });
}

}  // namespace MOR_ISA
}  // namespace mor
