#include "csrc/cpu/rows/segment_reduce.simd.h"

#include <algorithm>
#include <vector>

#include "csrc/cpu/rows/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

// A row of a segment; `ahead` is a row needed soon.
template <class T>
struct Member {
  const T *row, *ahead;
  acc_t<T> weight;
};

// The members of one segment.
template <class T>
struct Segment {
  const Member<T>*begin, *end;
  acc_t<T> divisor;  // of the sum
};

// Takes the entries on segment s from `first` on; returns the first one on a later segment.
template <class T>
int64_t take_members(const SegmentReduce& a, int64_t s, int64_t first,
                     std::vector<Member<T>>& out) {
  out.clear();
  const RowEntries& entries = *a.entries;
  const int64_t ahead = rows_ahead(a.width * sizeof(T));
  const auto index = [&](int64_t j) { return entries.order != nullptr ? entries.order[j] : j; };
  const auto row = [&](int64_t i) { return static_cast<const T*>(a.x) + i * a.x_stride; };
  for (; first < entries.count && entries.rows[first] == s; ++first) {
    const int64_t i = index(first);
    out.push_back({row(i), row(index(std::min(first + ahead, entries.count - 1))),
                   scale_at<acc_t<T>>(a.weights, i)});
  }
  return first;
}

// Stores a value of T unchanged, subnormals too: the backward of amax looks for it.
template <class V, class T>
inline void put_exact(T* p, V v) {
  if constexpr (std::is_same_v<V, VecPair>) store_exact(p, v);
  else put(p, v);
}

// The larger; a NaN is larger than all.
template <class V>
inline V larger(V a, V b) {
  if constexpr (std::is_same_v<V, VecPair>) return {larger(a.even, b.even), larger(a.odd, b.odd)};
  else return (b > a) | (b != b) ? b : a;
}

// Takes `rest` where x is the largest value, out.
template <class V>
inline V take_if_largest(V x, V out, V& rest) {
  if constexpr (std::is_same_v<V, VecPair>) {
    return {take_if_largest(x.even, out.even, rest.even),
            take_if_largest(x.odd, out.odd, rest.odd)};
  } else {
    const auto largest = (x == out) | ((x != x) & (out != out));
    const V taken = largest ? rest : V{};
    rest = largest ? V{} : rest;  // given away: later equals get none
    return taken;
  }
}

// kUnroll vectors of one output row at d, held in registers over the members.
template <class V, Reduce kReduce, int kUnroll, bool kStream, class T>
[[gnu::always_inline]] inline void reduce_part(const Segment<T>& segment, T* out, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  V acc[kUnroll]{};
  for (const Member<T>* m = segment.begin; m != segment.end; ++m) {
    for (int64_t e = 0; e < kUnroll * lanes<V>; e += kLine) __builtin_prefetch(m->ahead + d + e);
    for (int u = 0; u < kUnroll; ++u) {
      const V v = get<V>(m->row + d + u * lanes<V>);
      if constexpr (kReduce == Reduce::kAmax) {
        if (m == segment.begin) acc[u] = v;
        else acc[u] = larger(acc[u], v);
      } else {
        acc[u] += v * m->weight;
      }
    }
  }
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (kReduce == Reduce::kMean) acc[u] /= segment.divisor;
    if constexpr (kReduce == Reduce::kAmax) put_exact(out + d + u * lanes<V>, acc[u]);
    else if constexpr (kStream && lanes<V> > 1) stream(out + d + u * lanes<V>, acc[u]);
    else put(out + d + u * lanes<V>, acc[u]);
  }
}

template <class T, Reduce kReduce, bool kStream>
void reduce_segments(const SegmentReduce& a, int64_t begin, int64_t end) {
  using V = wide_t<T>;
  using Acc = acc_t<T>;
  std::vector<Member<T>> members;
  int64_t j = first_entry(*a.entries, begin);
  for (int64_t s = begin; s < end; ++s) {
    j = take_members(a, s, j, members);
    Segment<T> segment{members.data(), members.data() + members.size(), 1};
    if constexpr (kReduce == Reduce::kMean) {
      Acc total = 0;
      for (const Member<T>& m : members) total += m.weight;
      static_cast<Acc*>(a.totals)[s] = total;
      if (total == 0) segment = {nullptr, nullptr, 1};
      else segment.divisor = total;
    }
    T* out = static_cast<T*>(a.out) + s * a.width;
    int64_t d = 0;
    for (; d + 4 * lanes<V> <= a.width; d += 4 * lanes<V>)
      reduce_part<V, kReduce, 4, kStream>(segment, out, d);
    for (; d + lanes<V> <= a.width; d += lanes<V>)
      reduce_part<V, kReduce, 1, kStream>(segment, out, d);
    for (; d < a.width; ++d) reduce_part<Acc, kReduce, 1, false>(segment, out, d);
  }
  if (kStream) stream_fence();
}

// One vector of a segment's rows of grad_x.
template <class V, class T>
[[gnu::always_inline]] inline void amax_backward_part(const SegmentAmaxBackward& a, int64_t s,
                                                      int64_t first, int64_t last, int64_t d) {
  const V out = get<V>(static_cast<const T*>(a.out) + s * a.out_stride + d);
  V rest = get<V>(static_cast<const T*>(a.grad) + s * a.grad_stride + d);
  for (int64_t j = first; j < last; ++j) {
    const int64_t i = a.entries->order != nullptr ? a.entries->order[j] : j;
    const V x = get<V>(static_cast<const T*>(a.x) + i * a.x_stride + d);
    put_exact(static_cast<T*>(a.grad_x) + i * a.width + d, take_if_largest(x, out, rest));
  }
}

}  // namespace

void segment_reduce_rows(const SegmentReduce& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&]<class T>(T) {
    const auto run = [&]<Reduce kReduce>() {
      a.stream ? reduce_segments<T, kReduce, true>(a, begin, end)
               : reduce_segments<T, kReduce, false>(a, begin, end);
    };
    switch (a.reduce) {
      case Reduce::kSum:
        return run.template operator()<Reduce::kSum>();
      case Reduce::kMean:
        return run.template operator()<Reduce::kMean>();
      default:
        return run.template operator()<Reduce::kAmax>();
    }
  });
}

void segment_amax_backward_rows(const SegmentAmaxBackward& a, int64_t begin, int64_t end) {
  dispatch_floating(a.dtype, [&]<class T>(T) {
    using V = wide_t<T>;
    const RowEntries& entries = *a.entries;
    int64_t first = first_entry(entries, begin);
    for (int64_t s = begin; s < end; ++s) {
      int64_t last = first, d = 0;
      while (last < entries.count && entries.rows[last] == s) ++last;
      for (; d + lanes<V> <= a.width; d += lanes<V>) amax_backward_part<V, T>(a, s, first, last, d);
      for (; d < a.width; ++d) amax_backward_part<acc_t<T>, T>(a, s, first, last, d);
      first = last;
    }
  });
}

}  // namespace MOR_ISA
}  // namespace mor
