#include "csrc/ops/route_threshold.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "csrc/cpu/routing/route_threshold.short.h"
#include "csrc/cpu/routing/route_threshold.simd.h"
#include "csrc/cpu/routing/sequences.h"
#include "csrc/tensors.h"

namespace mor {
namespace {

// The cut of one sequence, and how many rows it chooses; returns the first row whose weight is
// none, or -1.
int64_t cut_sequence(const ThresholdRule& rule, double threshold, RouteTopkSequence& s,
                     void* scratch) {
  route_topk_choose(s, 0, 0);
  s.nan_row = -1;
  if (s.end - s.begin <= kShortSequence) {
    int64_t bad = -1;
    dispatch_floating(rule.dtype, [&]<class T>(T) { bad = cut_short<T>(rule, threshold, s); });
    return bad;
  }
  const int64_t available =
      s.candidates ? count_rows(s.candidates, nullptr, s.begin, s.end) : s.end - s.begin;
  if (available == 0) return -1;
  if (rule.kind == ThresholdKind::kMass) {
    const int64_t bad = MOR_BEST(route_threshold_mass)(rule.dtype, s, threshold, scratch);
    if (bad >= 0) return bad;
  } else {
    s.cut = threshold;
    if (rule.kind == ThresholdKind::kQuantile) {
      s.k = available - (rule.dtype == ScalarType::Double
                             ? quantile_place<double>(threshold, available, rule.inclusive)
                             : quantile_place<float>(threshold, available, rule.inclusive));
      s.select = true;
      MOR_BEST(route_topk_find)(rule.dtype, s, scratch);
    }
    if (s.nan_row < 0) MOR_BEST(route_threshold_count)(rule.dtype, s, rule.inclusive);
  }
  const int64_t k = rule.bounded(s.num_rows, available);
  if (s.nan_row < 0 && k != s.num_rows) {
    route_topk_choose(s, k, available);
    s.num_rows = k;
    if (s.select) MOR_BEST(route_topk_find)(rule.dtype, s, scratch);
  }
  return -1;
}

double score_at(const Tensor& scores, int64_t row) {
  double score = 0;
  dispatch_floating(scores.scalar_type(), [&]<class T>(T) {
    score = static_cast<double>(scores.const_data_ptr<T>()[row]);
  });
  return score;
}

std::vector<double> thresholds(double threshold, const std::optional<Tensor>& each,
                               const RouteThresholdDims& dims) {
  std::vector<double> values(dims.num_sequences, threshold);
  if (!each.has_value()) return values;
  const Tensor given = as_contiguous(*each);
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    double& t = values[b];
    t = given.scalar_type() == ScalarType::Double ? given.const_data_ptr<double>()[b]
                                                  : given.const_data_ptr<float>()[b];
    MOR_CHECK(t == t, "route_threshold: expected threshold not to be nan, got threshold[", b,
              "] = nan");
    MOR_CHECK(dims.kind == ThresholdKind::kAbsolute || (t >= 0 && t <= 1),
              "route_threshold: expected threshold in [0, 1], got threshold[", b, "] = ", t);
  }
  return values;
}

std::tuple<Tensor, Tensor> route_threshold_cpu(const Tensor& scores_in, double threshold,
                                               const std::optional<Tensor>& threshold_each,
                                               const Tensor& cu_seqlens_in, std::string kind,
                                               bool inclusive, int64_t min_k, int64_t max_k,
                                               const std::optional<Tensor>& candidates_in,
                                               std::optional<int64_t> max_rows) {
  const auto dims = check_route_threshold(scores_in, threshold, threshold_each, cu_seqlens_in, kind,
                                          inclusive, min_k, max_k, candidates_in, max_rows);
  const char* op = "route_threshold";
  const Tensor scores = as_contiguous(scores_in), cu_seqlens = as_contiguous(cu_seqlens_in);
  const auto candidates = as_contiguous(candidates_in);
  check_cu_seqlens_values(cu_seqlens, dims.num_rows, op, "cu_seqlens");
  const std::vector<double> threshold_of = thresholds(threshold, threshold_each, dims);
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  std::vector<RouteTopkSequence> sequences(dims.num_sequences);
  std::vector<int64_t> bad(dims.num_sequences, -1);
  int64_t longest = 0;
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    RouteTopkSequence& s = sequences[b];
    s.scores = scores.const_data_ptr();
    if (candidates.has_value())
      s.candidates = static_cast<const uint8_t*>(candidates->const_data_ptr());
    s.begin = cu[b];
    s.end = cu[b + 1];
    longest = std::max(longest, s.end - s.begin);
  }
  const ThresholdRule rule{scores.scalar_type(), dims.kind, inclusive, min_k, max_k};
  for_each_sequence(dims.num_rows, dims.num_sequences, longest, [&](int64_t b, void* scratch) {
    bad[b] = cut_sequence(rule, threshold_of[b], sequences[b], scratch);
  });

  Tensor chosen = new_tensor(scores, {dims.num_sequences + 1}, ScalarType::Int);
  int32_t* starts = chosen.mutable_data_ptr<int32_t>();
  int64_t total = starts[0] = 0;
  for (int64_t b = 0; b < dims.num_sequences; ++b) {
    MOR_CHECK(sequences[b].nan_row < 0, op, ": expected scores without NaN, got scores[",
              sequences[b].nan_row, "] = nan");
    MOR_CHECK(bad[b] < 0, op, ": expected weights that are finite and not negative, got scores[",
              bad[b], "] = ", score_at(scores, bad[b]));
    starts[b + 1] = static_cast<int32_t>(total += sequences[b].num_rows);
  }
  const int64_t size = max_rows.value_or(total);
  MOR_CHECK(total <= size, op, ": expected max_rows of at least ", total,
            " (the rows chosen), got ", size);
  Tensor rows = new_tensor(scores, {size}, ScalarType::Long);
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  const auto write = MOR_BEST(route_topk_write);
  for_each_sequence(dims.num_rows, dims.num_sequences, 0, [&](int64_t b, void*) {
    RouteTopkSequence& s = sequences[b];
    s.rows = out + starts[b];
    if (s.num_rows == 0) return;
    if (s.end - s.begin > kShortSequence) return write(rule.dtype, s);
    dispatch_floating(rule.dtype, [&]<class T>(T) { write_short<T>(s); });
  });
  std::fill(out + total, out + size, int64_t{-1});
  return {rows, chosen};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CPU, m) {
  m.impl("route_threshold", TORCH_BOX(&mor::route_threshold_cpu));
}
