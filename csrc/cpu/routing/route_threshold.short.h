// Sequences of a few rows (the experts of one token): sorted by insertion, which is faster than
// looking for a cut bit by bit. Included by route_threshold.cpp only.
#pragma once

#include <cmath>

#include "csrc/cpu/routing/route_topk.simd.h"
#include "csrc/cpu/tuning.h"
#include "csrc/ops/route_threshold.h"

namespace mor {

// How every sequence is cut.
struct ThresholdRule {
  ScalarType dtype;
  ThresholdKind kind;
  bool inclusive;
  int64_t min_k, max_k;

  int64_t bounded(int64_t count, int64_t available) const {
    return std::min({std::max(count, min_k), max_k < 0 ? available : max_k, available});
  }
};

// How many of n > 0 weights, best first, are needed: in the units of route_threshold.h.
template <class Acc>
int64_t count_mass(const Acc* best, int64_t n, double mass) {
  const auto largest = static_cast<double>(best[0]);
  if (largest == 0) return 0;
  const int log_n = n == 1 ? 0 : 64 - __builtin_clzll(static_cast<uint64_t>(n - 1));
  const int shift = 50 - log_n - std::ilogb(largest);
  const double factor = std::ldexp(1.0, shift / 2), other = std::ldexp(1.0, shift - shift / 2);
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer
  double units[kShortSequence], total = 0;
  for (int64_t i = 0; i < n; ++i)
    total += units[i] = (static_cast<double>(best[i]) * factor * other + magic) - magic;
  const double wanted = std::ceil(mass * total);
  int64_t count = 0;
  for (double sum = 0; sum < wanted; ++count) sum += units[count];
  return count;
}

// Absolute thresholds need no order, unless a bound decides: counts without a branch. Returns
// whether it is done.
template <class T>
bool count_short(const ThresholdRule& rule, double threshold, RouteTopkSequence& s) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto limit = static_cast<Acc>(threshold);
  int64_t count = 0, available = 0, numbers = 0;
  for (int64_t row = s.begin; row < s.end; ++row) {
    const auto score = static_cast<Acc>(static_cast<const T*>(s.scores)[row]);
    const bool competes = s.candidates == nullptr || s.candidates[row];
    count += competes & (rule.inclusive ? score >= limit : score > limit);
    available += competes;
    numbers += competes & (score == score);
  }
  s.num_rows = count;
  s.cut = threshold;
  s.ties = rule.inclusive ? kShortSequence : 0;
  return numbers == available && rule.bounded(count, available) == count;
}

// As cut_sequence, for up to kShortSequence rows.
template <class T>
int64_t cut_short(const ThresholdRule& rule, double threshold, RouteTopkSequence& s) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const bool mass = rule.kind == ThresholdKind::kMass;
  if (rule.kind == ThresholdKind::kAbsolute && count_short<T>(rule, threshold, s)) return -1;
  Acc best[kShortSequence];
  int64_t n = 0, count = 0;
  for (int64_t row = s.begin; row < s.end; ++row) {
    if (s.candidates && !s.candidates[row]) continue;
    const auto score = static_cast<Acc>(static_cast<const T*>(s.scores)[row]);
    if (score != score) {
      s.nan_row = row;
      return -1;
    }
    if (mass && !(score >= 0 && score <= std::numeric_limits<Acc>::max())) return row;
    int64_t i = n++;
    for (; i > 0 && best[i - 1] < score; --i) best[i] = best[i - 1];
    best[i] = score;
  }
  if (mass && n > 0) {
    count = count_mass(best, n, threshold);
  } else if (n > 0) {
    const Acc limit = rule.kind == ThresholdKind::kAbsolute
                          ? static_cast<Acc>(threshold)
                          : best[n - 1 - quantile_place<Acc>(threshold, n, rule.inclusive)];
    while (count < n && (rule.inclusive ? best[count] >= limit : best[count] > limit)) ++count;
  }
  s.num_rows = rule.bounded(count, n);
  s.ties = 0;
  if (s.num_rows == 0) return -1;
  s.cut = best[s.num_rows - 1];
  while (s.ties < s.num_rows && best[s.num_rows - 1 - s.ties] == best[s.num_rows - 1]) ++s.ties;
  return -1;
}

// As route_topk_write.
template <class T>
void write_short(const RouteTopkSequence& s) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto cut = static_cast<Acc>(s.cut);
  int64_t *out = s.rows, *end = out + s.num_rows;
  int64_t ties = s.ties;
  for (int64_t row = s.begin; out != end; ++row) {
    const auto score = static_cast<Acc>(static_cast<const T*>(s.scores)[row]);
    const bool competes = s.candidates == nullptr || s.candidates[row];
    const bool equal = competes & (score == cut) & (ties > 0);
    ties -= equal;
    *out = row;  // overwritten unless the row is chosen
    out += equal | (competes & (score > cut));
  }
}

}  // namespace mor
