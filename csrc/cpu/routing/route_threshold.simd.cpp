#include "csrc/cpu/routing/route_threshold.simd.h"

#include <cmath>
#include <limits>

#include "csrc/cpu/routing/score_blocks.h"

namespace mor {
namespace MOR_ISA {
namespace {

constexpr int kHalf = kLanes / 2;
typedef double VecD __attribute__((vector_size(kHalf * 8)));
typedef int64_t VecL __attribute__((vector_size(kHalf * 8)));

// Bits of a block that are no number.
template <class T>
uint64_t nan_bits(const T* scores) {
  uint64_t nan = 0;
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < kBlock; ++i) nan |= static_cast<uint64_t>(scores[i] != scores[i]) << i;
  } else {
    for (int i = 0; i < kBlock; i += kLanes) {
      const VecF score = load(scores + i);
      nan |= lane_bits(score != score) << i;
    }
  }
  return nan;
}

template <class T>
void count(RouteTopkSequence& s, bool inclusive) {
  s.num_rows = 0;
  s.nan_row = -1;
  s.ties = inclusive ? std::numeric_limits<int64_t>::max() : 0;
  const auto cut = static_cast<acc_t<T>>(s.cut);
  for_each_block<T>(s, [&](int64_t row, const T* scores, uint64_t candidate, uint64_t) {
    uint64_t above, equal;
    compare_block<T>(scores, cut, &above, &equal);
    s.num_rows += __builtin_popcountll((inclusive ? above | equal : above) & candidate);
    const uint64_t nan = nan_bits(scores) & candidate;
    if (nan && s.nan_row < 0) s.nan_row = row + __builtin_ctzll(nan);
  });
}

inline VecD load_doubles(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// To the nearest integer; |v| below 2^51.
template <class V>
inline V rounded(V v) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  return (v + magic) - magic;
}

struct Share {
  double mass;  // an integer
  int64_t count;
};

// Of the n weights (a multiple of kBlock) that are at least `bound`.
Share share_from(const double* weights, int64_t n, double bound) {
  const VecD limit = VecD{} + bound;
  VecD mass[2]{};
  VecL count[2]{};
  for (int64_t i = 0; i < n; i += 2 * kHalf) {
    for (int j = 0; j < 2; ++j) {
      const VecD v = load_doubles(weights + i + j * kHalf);
      const VecL taken = v >= limit;
      const VecD integer = rounded(v);
      VecL bits;
      std::memcpy(&bits, &integer, sizeof bits);
      bits &= taken;
      VecD part;
      std::memcpy(&part, &bits, sizeof part);
      mass[j] += part;
      count[j] -= taken;  // true is -1
    }
  }
  const VecD sums = mass[0] + mass[1];
  const VecL counts = count[0] + count[1];
  Share share{0, 0};
  for (int lane = 0; lane < kHalf; ++lane) {
    share.mass += sums[lane];
    share.count += counts[lane];
  }
  return share;
}

int64_t bits_of(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
double value_of(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The low bits of a double that are zero for every T.
template <class T>
constexpr int kZeroBits = std::is_same_v<T, double>     ? 0
                          : std::is_same_v<T, float>    ? 29
                          : std::is_same_v<T, BFloat16> ? 45
                                                        : 42;

// The first row that competes with a NaN (s.nan_row) and with a weight that is negative or
// infinite.
template <class T>
int64_t find_bad_weight(RouteTopkSequence& s) {
  int64_t bad_row = -1;
  for_each_block<T>(s, [&](int64_t row, const T* scores, uint64_t candidate, uint64_t) {
    for (uint64_t rest = candidate; rest; rest &= rest - 1) {
      const int i = __builtin_ctzll(rest);
      const auto weight = static_cast<double>(scores[i]);
      if (weight != weight && s.nan_row < 0) s.nan_row = row + i;
      if ((weight < 0 || weight > std::numeric_limits<double>::max()) && bad_row < 0)
        bad_row = row + i;
    }
  });
  return bad_row;
}

template <class T>
int64_t mass_cut(RouteTopkSequence& s, double mass, void* scratch) {
  auto* weights = static_cast<double*>(scratch);
  int64_t n = 0;
  uint64_t highest = 0;  // as bits, which order as numbers do; anything that is no weight is higher
  s.nan_row = -1;
  for_each_block<T>(s, [&](int64_t, const T* scores, uint64_t candidate, uint64_t) {
    double* to = weights + n;
    for (int i = 0; i < kBlock; ++i) to[i] = static_cast<double>(scores[i]) + 0.0;  // -0.0 is +0.0
    int64_t count = kBlock;
    if (candidate != ~uint64_t{0}) {
      count = 0;
      for (uint64_t rest = candidate; rest; rest &= rest - 1)
        to[count++] = to[__builtin_ctzll(rest)];
    }
    for (int64_t i = 0; i < count; ++i) {
      const auto bits = static_cast<uint64_t>(bits_of(to[i]));
      highest = bits > highest ? bits : highest;
    }
    n += count;
  });
  s.num_rows = s.ties = 0;
  s.cut = kNoCut;
  if (highest >= static_cast<uint64_t>(bits_of(kNoCut))) return find_bad_weight<T>(s);
  if (highest == 0) return -1;

  // Scaled by a power of two so that the sum of all stays below 2^51: rounded to integers, they add
  // up exactly in any order.
  const int log_n = n == 1 ? 0 : 64 - __builtin_clzll(static_cast<uint64_t>(n - 1));
  const int shift = 50 - log_n - std::ilogb(value_of(static_cast<int64_t>(highest)));
  const double factor = std::ldexp(1.0, shift / 2), other = std::ldexp(1.0, shift - shift / 2);
  for (int64_t i = 0; i < n; ++i) weights[i] = weights[i] * factor * other;
  for (; n % kBlock; ++n) weights[n] = 0;
  const double total = share_from(weights, n, 0).mass;
  const double wanted = std::ceil(mass * total);
  if (wanted <= 0) return -1;

  // The largest weight such that it and those above it have what is wanted. Weights below 0.5 are
  // 0, and above 2^51 there is none.
  constexpr int64_t kOne = int64_t{1} << kZeroBits<T>;
  int64_t low = bits_of(0.5) / kOne, high = bits_of(2251799813685248.0) / kOne;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (share_from(weights, n, value_of(middle * kOne)).mass >= wanted ? low : high) = middle;
  }
  const double cut = value_of(low * kOne);
  const Share above = share_from(weights, n, value_of((low + 1) * kOne));
  const auto missing = static_cast<int64_t>(wanted - above.mass);
  const auto each = static_cast<int64_t>(rounded(cut));
  s.ties = (missing + each - 1) / each;
  s.cut = std::ldexp(cut, -shift);
  s.num_rows = above.count + s.ties;
  return -1;
}

}  // namespace

void route_threshold_count(torch::headeronly::ScalarType dtype, RouteTopkSequence& s,
                           bool inclusive) {
  dispatch_scores(dtype, [&]<class T>(T) { count<T>(s, inclusive); });
}

int64_t route_threshold_mass(torch::headeronly::ScalarType dtype, RouteTopkSequence& s, double mass,
                             void* scratch) {
  int64_t bad_row = -1;
  dispatch_scores(dtype, [&]<class T>(T) { bad_row = mass_cut<T>(s, mass, scratch); });
  return bad_row;
}

}  // namespace MOR_ISA
}  // namespace mor
