#include "csrc/ops/route_topk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "csrc/cpu/routing/sequences.h"
#include "csrc/tensors.h"

namespace mor {
namespace {

// Best first: score, then the smaller row; a NaN (a protected row's) comes last.
void sort_by_score(const Tensor& scores, int64_t* rows, int64_t num_rows) {
  dispatch_floating(scores.scalar_type(), [&]<class T>(T) {
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const T* score = scores.const_data_ptr<T>();
    std::vector<std::pair<Acc, int64_t>> pairs;
    pairs.reserve(num_rows);
    for (int64_t i = 0; i < num_rows; ++i)
      pairs.emplace_back(static_cast<Acc>(score[rows[i]]), rows[i]);
    std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) {
      const bool a_nan = a.first != a.first, b_nan = b.first != b.first;
      if (a_nan != b_nan) return b_nan;
      if (!a_nan && a.first != b.first) return a.first > b.first;
      return a.second < b.second;
    });
    for (int64_t i = 0; i < num_rows; ++i) rows[i] = pairs[i].second;
  });
}

Tensor route_topk_cpu(const Tensor& scores_in, int64_t k, const std::optional<Tensor>& k_each_in,
                      const Tensor& cu_seqlens_in, int64_t num_rows,
                      const std::optional<Tensor>& candidates_in,
                      const std::optional<Tensor>& protected_rows_in, bool by_score) {
  const auto dims = check_route_topk(scores_in, k, k_each_in, cu_seqlens_in, num_rows,
                                     candidates_in, protected_rows_in);
  const auto bytes = [](const std::optional<Tensor>& t) {
    return t.has_value() ? static_cast<const uint8_t*>(t->const_data_ptr()) : nullptr;
  };
  const Tensor scores = as_contiguous(scores_in), cu_seqlens = as_contiguous(cu_seqlens_in);
  const auto k_each = as_contiguous(k_each_in);
  const auto candidates = as_contiguous(candidates_in);
  const auto protected_rows = as_contiguous(protected_rows_in);
  check_cu_seqlens_values(cu_seqlens, dims.num_rows, "route_topk", "cu_seqlens");

  const uint8_t *candidate = bytes(candidates), *kept = bytes(protected_rows);
  const int64_t* k_of = k_each.has_value() ? k_each->const_data_ptr<int64_t>() : nullptr;
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  std::vector<RouteTopkSequence> sequences(dims.num_sequences);
  int64_t total = 0, longest = 0;
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    const int64_t begin = cu[b], end = cu[b + 1], wanted = k_of ? k_of[b] : k;
    const int64_t num_kept = kept ? count_rows(kept, nullptr, begin, end) : 0;
    const int64_t available =
        candidate ? count_rows(candidate, kept, begin, end) : end - begin - num_kept;
    MOR_CHECK(wanted >= 0, "route_topk: expected k >= 0, got k = ", wanted, " for sequence ", b);
    MOR_CHECK(wanted <= available, "route_topk: sequence ", b, " has ", available,
              " rows to choose from, got k = ", wanted);
    RouteTopkSequence& sequence = sequences[b];
    sequence = {};
    sequence.scores = scores.const_data_ptr();
    sequence.candidates = candidate;
    sequence.protected_rows = kept;
    sequence.begin = begin;
    sequence.end = end;
    sequence.num_rows = wanted + num_kept;
    route_topk_choose(sequence, wanted, available);
    total += sequence.num_rows;
    longest = std::max(longest, end - begin);
  }
  MOR_CHECK(total == num_rows, "route_topk: expected num_rows = ", total,
            " (sum of k and the protected rows), got ", num_rows);
  Tensor rows = new_tensor(scores, {num_rows}, ScalarType::Long);
  int64_t* next = rows.mutable_data_ptr<int64_t>();
  for (RouteTopkSequence& sequence : sequences) {
    sequence.rows = next;
    next += sequence.num_rows;
  }

  const auto find = MOR_BEST(route_topk_find);
  const auto write = MOR_BEST(route_topk_write);
  const ScalarType dtype = scores.scalar_type();
  for_each_sequence(dims.num_rows, dims.num_sequences, longest, [&](int64_t b, void* scratch) {
    RouteTopkSequence& sequence = sequences[b];
    find(dtype, sequence, scratch);
    if (sequence.nan_row >= 0) return;
    write(dtype, sequence);
    if (by_score) sort_by_score(scores, sequence.rows, sequence.num_rows);
  });
  for (const RouteTopkSequence& sequence : sequences) {
    MOR_CHECK(sequence.nan_row < 0, "route_topk: expected scores without NaN, got scores[",
              sequence.nan_row, "] = nan");
  }
  return rows;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) { m.impl("route_topk", TORCH_BOX(&mor::route_topk_cpu)); }
