// No sort. Scores become order-preserving signed integers; the k-th largest is found bit by bit,
// each bit by one vectorised count over all rows of the sequence, so the time does not depend on
// the data. float32 keys are two 16-bit digits: that halves the width of the counts twice.
#include "csrc/cpu/routing/route_topk.simd.h"

#include <limits>
#include <type_traits>

#include "csrc/cpu/routing/score_blocks.h"

namespace mor {
namespace MOR_ISA {
namespace {

typedef int16_t VecS __attribute__((vector_size(kLanes * 2)));

template <class T>
using digit_t = std::conditional_t<std::is_same_v<T, double>, int64_t, int16_t>;

// The integers order as the numbers do; adding 0 makes -0.0 equal to +0.0. Its own inverse.
inline VecI key_of(VecF score) {
  const VecF canonical = score + splat(0.0f);
  VecI bits;
  std::memcpy(&bits, &canonical, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int64_t key_of(double score) {
  const double canonical = score + 0.0;
  int64_t bits;
  std::memcpy(&bits, &canonical, sizeof bits);
  return bits ^ ((bits >> 63) & std::numeric_limits<int64_t>::max());
}
inline float score_of(int32_t key) {
  key ^= (key >> 31) & 0x7fffffff;
  float score;
  std::memcpy(&score, &key, sizeof score);
  return score;
}
inline double score_of(int64_t key) {
  key ^= (key >> 63) & std::numeric_limits<int64_t>::max();
  double score;
  std::memcpy(&score, &key, sizeof score);
  return score;
}

// The keys of one block as digits; double has one digit of 64 bits and leaves `low` alone. Returns
// the bits of NaN.
template <class T>
uint64_t load_block(const T* scores, digit_t<T>* high, digit_t<T>* low) {
  uint64_t nan = 0;
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < kBlock; ++i) {
      high[i] = key_of(scores[i]);
      nan |= static_cast<uint64_t>(scores[i] != scores[i]) << i;
    }
  } else {
    for (int i = 0; i < kBlock; i += kLanes) {
      const VecF score = load(scores + i);
      const VecI key = key_of(score);
      nan |= lane_bits(score != score) << i;
      const VecS h = __builtin_convertvector(key >> 16, VecS);
      const VecS l = __builtin_convertvector((key & 0xffff) - 0x8000, VecS);
      std::memcpy(high + i, &h, sizeof h);
      std::memcpy(low + i, &l, sizeof l);
    }
  }
  return nan;
}

// How many of the n digits (a multiple of kBlock) are above `bound`.
inline int64_t count_above(const int64_t* digits, int64_t n, int64_t bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += digits[i] > bound;
  return count;
}
inline int64_t count_above(const int16_t* digits, int64_t n, int16_t bound) {
  // At most 32 bytes: with 64 the comparison goes through mask registers, measured 1.5 times
  // slower.
  constexpr int kWidth = kLanes < 8 ? 8 : 16;
  typedef int16_t Vec __attribute__((vector_size(kWidth * 2)));
  typedef int32_t Wide __attribute__((vector_size(kWidth * 2)));
  constexpr int64_t kMaxDigits = 0x4000 * kWidth;  // lanes count in 16 bits, four of them are added
  const Vec limit = Vec{} + bound;
  int64_t count = 0;
  for (int64_t first = 0; first < n; first += kMaxDigits) {
    const int64_t last = first + kMaxDigits < n ? first + kMaxDigits : n;
    Vec lanes[4] = {};
    for (int64_t i = first; i < last; i += 4 * kWidth) {
      for (int j = 0; j < 4; ++j) {
        Vec v;
        std::memcpy(&v, digits + i + j * kWidth, sizeof v);
        lanes[j] -= v > limit;  // true is -1
      }
    }
    Wide pairs;
    const Vec sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    std::memcpy(&pairs, &sum, sizeof pairs);
    pairs = (pairs & 0xffff) + (pairs >> 16);
    for (int lane = 0; lane < kWidth / 2; ++lane) count += pairs[lane];
  }
  return count;
}

// The largest digit that at least k of the n digits reach; k >= 1.
template <class Digit>
Digit kth_largest(const Digit* digits, int64_t n, int64_t k) {
  using Unsigned = std::make_unsigned_t<Digit>;
  Digit kth = std::numeric_limits<Digit>::min();
  for (int bit = sizeof(Digit) * 8 - 1; bit >= 0; --bit) {
    // As the numbers are signed, setting the top bit of the minimum means adding it: 0.
    const auto next = static_cast<Digit>(static_cast<Unsigned>(kth) + (Unsigned{1} << bit));
    if (count_above(digits, n, static_cast<Digit>(next - 1)) >= k) kth = next;
  }
  return kth;
}

template <class Acc>
struct Threshold {
  Acc score;     // every row above it is selected
  int64_t ties;  // and this many, the first ones, of those equal to it
};

template <class T>
Threshold<acc_t<T>> find_threshold(digit_t<T>* high, digit_t<T>* low, int64_t n, int64_t k) {
  using Digit = digit_t<T>;
  const Digit h = kth_largest(high, n, k);
  const int64_t ties = k - count_above(high, n, h);
  if constexpr (std::is_same_v<T, double>) {
    return {score_of(h), ties};
  } else if constexpr (std::is_same_v<T, BFloat16>) {  // the low digit only repeats the sign
    return {score_of(static_cast<int32_t>(h * 0x10000 + (h < 0 ? 0xffff : 0))), ties};
  } else {
    constexpr Digit kNone =
        std::numeric_limits<Digit>::min();  // never counted: counts ask for more
    for (int64_t i = 0; i < n; ++i) low[i] = high[i] == h ? low[i] : kNone;
    const Digit l = kth_largest(low, n, ties);
    return {score_of(static_cast<int32_t>(h * 0x10000 + l + 0x8000)),
            ties - count_above(low, n, l)};
  }
}

template <class T>
void find(RouteTopkSequence& s, void* scratch) {
  using Digit = digit_t<T>;
  Digit* high = static_cast<Digit*>(scratch);
  Digit* low =
      std::is_same_v<T, double> ? high : high + (s.end - s.begin + 2 * kBlock) / kBlock * kBlock;
  int64_t n = 0;
  s.nan_row = -1;
  for_each_block<T>(s, [&](int64_t row, const T* scores, uint64_t candidate, uint64_t kept) {
    const uint64_t competes = candidate & ~kept;
    const uint64_t nan = load_block<T>(scores, high + n, low + n) & competes;
    if (nan && s.nan_row < 0) s.nan_row = row + __builtin_ctzll(nan);
    if (competes == ~uint64_t{0}) {
      n += kBlock;
      return;
    }
    Digit *to_high = high + n, *to_low = low + n;
    int64_t j = 0;
    for (uint64_t rest = competes; rest; rest &= rest - 1, ++j) {
      const int i = __builtin_ctzll(rest);
      to_high[j] = to_high[i];
      to_low[j] = to_low[i];
    }
    n += j;
  });
  if (s.nan_row >= 0 || !s.select) return;
  for (; n % kBlock; ++n) high[n] = low[n] = std::numeric_limits<Digit>::min();
  const auto threshold = find_threshold<T>(high, low, n, s.k);
  s.cut = threshold.score;
  s.ties = threshold.ties;
}

template <class T>
void write(const RouteTopkSequence& s) {
  int64_t* out = s.rows;
  int64_t ties = s.ties;
  for_each_block<T>(s, [&](int64_t row, const T* scores, uint64_t candidate, uint64_t kept) {
    const uint64_t competes = candidate & ~kept;
    uint64_t above, equal;
    compare_block<T>(scores, static_cast<acc_t<T>>(s.cut), &above, &equal);
    equal &= competes;
    const int64_t num_equal = __builtin_popcountll(equal);
    if (num_equal > ties) equal = lowest_set_bits(equal, ties);
    ties -= num_equal < ties ? num_equal : ties;
    out = write_rows((above & competes) | equal | kept, row, out);
  });
}

}  // namespace

void route_topk_find(torch::headeronly::ScalarType dtype, RouteTopkSequence& sequence,
                     void* scratch) {
  dispatch_scores(dtype, [&]<class T>(T) { find<T>(sequence, scratch); });
}

void route_topk_write(torch::headeronly::ScalarType dtype, const RouteTopkSequence& sequence) {
  dispatch_scores(dtype, [&]<class T>(T) { write<T>(sequence); });
}

}  // namespace MOR_ISA
}  // namespace mor
