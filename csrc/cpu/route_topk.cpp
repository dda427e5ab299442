#include "../ops/route_topk.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "route_topk.simd.h"

namespace mor {
namespace {

constexpr int64_t kRowsPerThread = 32768;  // some 30 us: less is not worth waking a thread

// Parallel over sequences, with enough rows for each thread.
template <class Body>
void for_each_sequence(const RouteTopkDims& dims, const Body& body) {
  const int64_t length = dims.num_rows / std::max<int64_t>(dims.num_sequences, 1) + 1;
  const int64_t grain = std::max<int64_t>(kRowsPerThread / length, 1);
  torch::stable::parallel_for(0, dims.num_sequences, grain, body);
}

int64_t count(const uint8_t* mask, const uint8_t* without, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t i = begin; i < end; ++i) total += mask[i] & ~(without ? without[i] : 0);
  return total;
}

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

Tensor route_topk_cpu(const Tensor& scores_in, const Tensor& k_in, const Tensor& cu_seqlens_in,
                      int64_t num_rows, const std::optional<Tensor>& candidates_in,
                      const std::optional<Tensor>& protected_rows_in, bool by_score) {
  const auto dims =
      check_route_topk(scores_in, k_in, cu_seqlens_in, num_rows, candidates_in, protected_rows_in);
  const auto contiguous = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);  // the call costs 0.3 us
  };
  const Tensor scores = contiguous(scores_in), k_each = contiguous(k_in);
  const Tensor cu_seqlens = contiguous(cu_seqlens_in);
  const auto candidates = candidates_in.has_value() ? contiguous(*candidates_in) : scores;
  const auto protected_rows =
      protected_rows_in.has_value() ? contiguous(*protected_rows_in) : scores;
  check_cu_seqlens_values(cu_seqlens, dims.num_rows, "route_topk", "cu_seqlens");

  const auto bytes = [](const Tensor& t, bool given) {
    return given ? static_cast<const uint8_t*>(t.const_data_ptr()) : nullptr;
  };
  const uint8_t* candidate = bytes(candidates, candidates_in.has_value());
  const uint8_t* kept = bytes(protected_rows, protected_rows_in.has_value());
  const int64_t* k = k_each.const_data_ptr<int64_t>();
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();

  std::vector<RouteTopkSequence> sequences(dims.num_sequences);
  int64_t total = 0, longest = 0;
  Tensor rows = torch::stable::new_empty(scores, {num_rows}, ScalarType::Long);
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    const int64_t length = cu[b + 1] - cu[b];
    const int64_t num_kept = kept ? count(kept, nullptr, cu[b], cu[b + 1]) : 0;
    const int64_t available =
        candidate ? count(candidate, kept, cu[b], cu[b + 1]) : length - num_kept;
    STD_TORCH_CHECK(k[b] >= 0, "route_topk: expected k >= 0, got k = ", k[b], " for sequence ", b);
    STD_TORCH_CHECK(k[b] <= available, "route_topk: sequence ", b, " has ", available,
                    " rows to choose from, got k = ", k[b]);
    sequences[b] = {scores.const_data_ptr(),
                    candidate,
                    kept,
                    cu[b],
                    cu[b + 1],
                    k[b],
                    available,
                    rows.mutable_data_ptr<int64_t>() + total};
    total += k[b] + num_kept;
    longest = std::max(longest, length);
  }
  STD_TORCH_CHECK(total == num_rows, "route_topk: expected num_rows = ", total,
                  " (sum of k and the protected rows), got ", num_rows);

  std::vector<int64_t> nan_rows(dims.num_sequences, -1);
  const auto run = MOR_BEST(route_topk_sequence);
  for_each_sequence(dims, [&](int64_t begin, int64_t end) {
    struct alignas(64) Line {
      char bytes[64];
    };
    const std::unique_ptr<Line[]> scratch(new Line[route_topk_scratch(longest) / 64 + 1]);
    for (int64_t b = begin; b < end; ++b) {
      nan_rows[b] = run(scores.scalar_type(), sequences[b], scratch.get());
      const int64_t* next = b + 1 < dims.num_sequences ? sequences[b + 1].rows
                                                       : rows.const_data_ptr<int64_t>() + num_rows;
      if (by_score && nan_rows[b] < 0)
        sort_by_score(scores, sequences[b].rows, next - sequences[b].rows);
    }
  });
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    STD_TORCH_CHECK(nan_rows[b] < 0, "route_topk: expected scores without NaN, got scores[",
                    nan_rows[b], "] = nan");
  }
  return rows;
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) { m.impl("route_topk", TORCH_BOX(&mor::route_topk_cpu)); }
