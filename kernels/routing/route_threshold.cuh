// How many rows of every packed sequence reach a threshold: the contract is in
// csrc/ops/route_threshold.h. What passes is always the c best rows, so one block counts c for a
// sequence, and route_topk.cuh then writes them.
#pragma once

#include "route_topk.cuh"

namespace mor {

enum class RouteRule { kAbsolute, kQuantile, kMass };

struct RouteThresholdArgs {
  RouteRule rule;
  bool inclusive, each_is_double;
  double threshold;            // of every sequence, unless threshold_each is given
  const void* threshold_each;  // [B] float or double, or null
  int64_t min_k, max_k;        // max_k -1: no bound
  int64_t max_rows;            // -1: no bound
  int64_t* counts;             // [B]
  int32_t* chosen;             // [B + 1] their sums, at most max_rows
};

// By warps, as GroupScan: 64-bit sums would spill otherwise.
using RouteMassScan = cub::BlockScan<uint64_t, kRouteThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct RouteThresholdShared {
  RouteShared route;
  alignas(32) typename RouteMassScan::TempStorage scan;  // CUB takes it for aligned so
  unsigned long long histogram[kRouteBins];
  unsigned long long highest, total, need, each;
  int digit;
};

__device__ __forceinline__ double route_threshold_of(const RouteThresholdArgs& rule, int64_t b) {
  double t = rule.threshold;
  if (rule.threshold_each != nullptr) {
    t = rule.each_is_double ? static_cast<const double*>(rule.threshold_each)[b]
                            : double(static_cast<const float*>(rule.threshold_each)[b]);
  }
  return rule.rule == RouteRule::kAbsolute ? t : fmin(fmax(t, 0.0), 1.0);
}

// A weight that is negative, infinite or NaN counts as 0.
template <class T>
__device__ __forceinline__ double route_weight(T score) {
  const double weight = double(to_acc(score));
  return weight > 0 && weight < INFINITY ? weight : 0;
}
template <class T>
__device__ __forceinline__ unsigned long long route_units(T score, int shift) {
  return static_cast<unsigned long long>(llrint(ldexp(route_weight(score), shift)));
}

// Calls body(row) for the rows of this thread that compete.
template <class Body>
__device__ __forceinline__ void for_each_competing(const RouteTopkArgs& args, RouteRange range,
                                                   Body&& body) {
  for (int64_t row = range.begin + threadIdx.x; row < range.end; row += kRouteThreads) {
    if (route_competes(args, row)) body(row);
  }
}

// The key of the last row that is needed for a mass of shared.need units (at least 1), best first;
// shared.need becomes the mass that rows with that very key must bring.
template <class T>
__device__ typename RouteKey<T>::type route_mass_select(const RouteTopkArgs& args,
                                                        RouteThresholdShared& shared,
                                                        const T* scores, RouteRange range,
                                                        int unit_shift) {
  using Key = typename RouteKey<T>::type;
  const int thread = threadIdx.x;
  Key prefix = 0;
  for (int shift = RouteKey<T>::kBits - 8; shift >= 0; shift -= 8) {
    if (thread < kRouteBins) shared.histogram[thread] = 0;
    __syncthreads();
    for_each_competing(args, range, [&](int64_t row) {
      const Key key = static_cast<Key>(route_key(scores[row]) >> shift);
      const unsigned long long units = route_units(scores[row], unit_shift);
      if (key >> 8 == prefix && units > 0)
        atomicAdd(&shared.histogram[static_cast<int>(key & 255)], units);
    });
    __syncthreads();
    const int bin = kRouteBins - 1 - thread;  // best digit first
    const uint64_t mass = bin >= 0 ? shared.histogram[bin] : 0, need = shared.need;
    uint64_t before;
    RouteMassScan(shared.scan).ExclusiveSum(mass, before);
    __syncthreads();  // every thread has read need
    if (before < need && need <= before + mass) {
      shared.digit = bin;
      shared.need = need - before;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<Key>(shared.digit);
  }
  return prefix;
}

template <class T>
__device__ int64_t route_mass_count(const RouteTopkArgs& args, RouteThresholdShared& shared,
                                    const T* scores, RouteRange range, double mass,
                                    int64_t available) {
  if (threadIdx.x == 0) shared.highest = shared.total = shared.each = 0;
  __syncthreads();
  unsigned long long highest = 0, total = 0, each = 0;  // doubles order as their bits
  for_each_competing(args, range, [&](int64_t row) {
    const double weight = route_weight(scores[row]);
    unsigned long long bits;
    memcpy(&bits, &weight, sizeof bits);
    highest = max(highest, bits);
  });
  atomicMax(&shared.highest, highest);
  __syncthreads();
  if (shared.highest == 0) return 0;
  double largest;
  memcpy(&largest, &shared.highest, sizeof largest);
  const int log_n = available == 1 ? 0 : 64 - __clzll(available - 1);
  const int shift = 50 - log_n - ilogb(largest);
  for_each_competing(args, range, [&](int64_t row) { total += route_units(scores[row], shift); });
  atomicAdd(&shared.total, total);
  __syncthreads();
  const double wanted = ceil(mass * double(shared.total));
  if (wanted <= 0) return 0;
  if (threadIdx.x == 0) shared.need = static_cast<unsigned long long>(wanted);
  const auto cut = route_mass_select<T>(args, shared, scores, range, shift);
  int above = 0;
  for_each_competing(args, range, [&](int64_t row) {
    const auto key = route_key(scores[row]);
    above += key > cut;
    if (key == cut) each = route_units(scores[row], shift);
  });
  atomicMax(&shared.each, each);
  const int count = route_sum(shared.route, above);
  return count + int64_t((shared.need + shared.each - 1) / shared.each);
}

// One block, one sequence at a time: counts[b].
template <class T>
__global__ void __launch_bounds__(kRouteThreads)
    route_threshold_kernel(const T* scores, RouteTopkArgs args, RouteThresholdArgs rule) {
  using Acc = acc_t<T>;
  MOR_DYN_SMEM(raw);
  RouteThresholdShared& shared = *reinterpret_cast<RouteThresholdShared*>(raw);
  for (int64_t b = blockIdx.x; b < args.num_sequences; b += gridDim.x) {
    const RouteRange range = route_range(args, b);
    const double threshold = route_threshold_of(rule, b);
    int passing = 0;
    for_each_competing(args, range, [&](int64_t) { ++passing; });
    const int64_t available = route_sum(shared.route, passing);
    int64_t count = 0;
    if (available > 0 && rule.rule == RouteRule::kMass) {
      count = route_mass_count<T>(args, shared, scores, range, threshold, available);
    } else if (available > 0) {
      passing = 0;
      if (rule.rule == RouteRule::kAbsolute) {
        const Acc limit = static_cast<Acc>(threshold);
        for_each_competing(args, range, [&](int64_t row) {
          const Acc score = to_acc(scores[row]);
          passing += rule.inclusive ? score >= limit : score > limit;
        });
      } else {
        const Acc h = static_cast<Acc>(threshold) * static_cast<Acc>(available - 1);
        int64_t place = static_cast<int64_t>(h);
        place += rule.inclusive && static_cast<Acc>(place) < h;
        int64_t need = available - min(place, available - 1);
        const auto limit = route_select<T>(args, shared.route, scores, range, need);
        for_each_competing(args, range, [&](int64_t row) {
          const auto key = route_key(scores[row]);
          passing += rule.inclusive ? key >= limit : key > limit;
        });
      }
      count = route_sum(shared.route, passing);
    }
    const int64_t most = rule.max_k < 0 ? available : min(rule.max_k, available);
    if (threadIdx.x == 0) rule.counts[b] = min(max(count, rule.min_k), most);
    __syncthreads();
  }
}

// A single block: chosen becomes the sums of counts.
static __global__ void __launch_bounds__(kRouteThreads)
    route_threshold_sums_kernel(RouteThresholdArgs rule, int64_t num_sequences) {
  MOR_DYN_SMEM(raw);
  RouteShared& shared = *reinterpret_cast<RouteShared*>(raw);
  const int64_t bound = rule.max_rows < 0 ? INT32_MAX : rule.max_rows;
  int64_t start = 0;
  for (int64_t first = 0; first < num_sequences; first += kRouteThreads) {
    const int64_t b = first + threadIdx.x;
    int before, total;
    RouteScan(shared.scan).ExclusiveSum(b < num_sequences ? int(rule.counts[b]) : 0, before, total);
    if (b < num_sequences) rule.chosen[b] = int32_t(min(start + before, bound));
    start += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) rule.chosen[num_sequences] = int32_t(min(start, bound));
}

// counts and chosen; launch_route_topk with k_each = counts writes the rows.
template <class T>
cudaError_t launch_route_threshold(const T* scores, const RouteTopkArgs& args,
                                   const RouteThresholdArgs& rule, cudaStream_t stream) {
  if (args.num_sequences > 0) {
    auto kernel = route_threshold_kernel<T>;
    MOR_LAUNCH(kernel, grid_for(args.num_sequences, 1), kRouteThreads, sizeof(RouteThresholdShared),
               stream, scores, args, rule);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  MOR_LAUNCH(route_threshold_sums_kernel, 1, kRouteThreads, sizeof(RouteShared), stream, rule,
             args.num_sequences);
  return cudaGetLastError();
}

}  // namespace mor
