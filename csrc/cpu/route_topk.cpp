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

Tensor route_topk_cpu(const Tensor& scores_in, int64_t k, const std::optional<Tensor>& k_each_in,
                      const Tensor& cu_seqlens_in, int64_t num_rows,
                      const std::optional<Tensor>& candidates_in,
                      const std::optional<Tensor>& protected_rows_in, bool by_score) {
  const auto dims = check_route_topk(scores_in, k, k_each_in, cu_seqlens_in, num_rows,
                                     candidates_in, protected_rows_in);
  const auto contiguous = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);  // the call costs 0.3 us
  };
  const auto contiguous_or_none = [&](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(contiguous(*t)) : std::nullopt;
  };
  const auto bytes = [](const std::optional<Tensor>& t) {
    return t.has_value() ? static_cast<const uint8_t*>(t->const_data_ptr()) : nullptr;
  };
  const Tensor scores = contiguous(scores_in), cu_seqlens = contiguous(cu_seqlens_in);
  const auto k_each = contiguous_or_none(k_each_in);
  const auto candidates = contiguous_or_none(candidates_in);
  const auto protected_rows = contiguous_or_none(protected_rows_in);
  check_cu_seqlens_values(cu_seqlens, dims.num_rows, "route_topk", "cu_seqlens");

  const uint8_t *candidate = bytes(candidates), *kept = bytes(protected_rows);
  const int64_t* k_of = k_each.has_value() ? k_each->const_data_ptr<int64_t>() : nullptr;
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  std::vector<RouteTopkSequence> sequences(dims.num_sequences);
  int64_t total = 0, longest = 0;
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    const int64_t begin = cu[b], end = cu[b + 1], wanted = k_of ? k_of[b] : k;
    const int64_t num_kept = kept ? count(kept, nullptr, begin, end) : 0;
    const int64_t available =
        candidate ? count(candidate, kept, begin, end) : end - begin - num_kept;
    MOR_CHECK(wanted >= 0, "route_topk: expected k >= 0, got k = ", wanted, " for sequence ", b);
    MOR_CHECK(wanted <= available, "route_topk: sequence ", b, " has ", available,
              " rows to choose from, got k = ", wanted);
    sequences[b] = {scores.const_data_ptr(), candidate, kept, begin, end, wanted, available,
                    wanted + num_kept,       nullptr,   -1};
    total += wanted + num_kept;
    longest = std::max(longest, end - begin);
  }
  MOR_CHECK(total == num_rows, "route_topk: expected num_rows = ", total,
            " (sum of k and the protected rows), got ", num_rows);
  Tensor rows = torch::stable::new_empty(scores, {num_rows}, ScalarType::Long);
  int64_t* next = rows.mutable_data_ptr<int64_t>();
  for (RouteTopkSequence& sequence : sequences) {
    sequence.rows = next;
    next += sequence.num_rows;
  }

  const auto run = MOR_BEST(route_topk_sequence);
  for_each_sequence(dims, [&](int64_t begin, int64_t end) {
    struct alignas(64) Line {
      char bytes[64];
    };
    const std::unique_ptr<Line[]> scratch(new Line[route_topk_scratch(longest) / 64 + 1]);
    for (int64_t b = begin; b < end; ++b) {
      RouteTopkSequence& sequence = sequences[b];
      run(scores.scalar_type(), sequence, scratch.get());
      if (by_score && sequence.nan_row < 0) sort_by_score(scores, sequence.rows, sequence.num_rows);
    }
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
