// The k best rows of every packed sequence, ascending or best first: the contract is in
// csrc/ops/route_topk.h. One block owns a sequence: radix select finds the score of the k-th best
// row (one shared histogram for each digit of 8 bits), then a block scan gives every chosen row its
// place, so rows come out ascending and ties go to the smaller one.
#pragma once

#include <cub/block/block_scan.cuh>

#include "../common.cuh"

namespace mor {

constexpr int kRouteThreads = 1024;
constexpr int kRouteBins = 256;

struct RouteTopkArgs {
  int64_t k;                      // of every sequence, unless k_each is given
  const int64_t* k_each;          // [B] or null
  const int32_t* cu_seqlens;      // [B + 1]
  const uint8_t* candidates;      // [N] or null
  const uint8_t* protected_rows;  // [N] or null
  int64_t* taken;                 // [B] scratch: k, clamped; null without masks
  int64_t* totals;  // [B] scratch: rows of the sequence that are returned; null without masks
  int64_t* starts;  // [B + 1] scratch of by_score: first output row; or null
  int64_t* rows;    // [num_selected]
  int64_t num_rows, num_sequences, num_selected;
  int64_t fill;  // for rows that the sequences do not fill
};

// Unsigned keys that order as the scores do; 0 is NaN, and -0.0 has the key of +0.0. bfloat16 and
// float16 keep the bits that can differ.
template <class T>
struct RouteKey {
  using type = uint32_t;
  static constexpr int kBits = sizeof(T) == 4 ? 32 : 24;
};
template <>
struct RouteKey<__nv_bfloat16> {
  using type = uint32_t;
  static constexpr int kBits = 16;
};
template <>
struct RouteKey<double> {
  using type = uint64_t;
  static constexpr int kBits = 64;
};

template <class T>
__device__ __forceinline__ typename RouteKey<T>::type route_key(T value) {
  using Key = typename RouteKey<T>::type;
  constexpr int kAccBits = int(sizeof(Key)) * 8;
  const auto score = to_acc(value);
  if (score != score) return 0;
  if (score == 0) return Key{1} << (RouteKey<T>::kBits - 1);
  Key bits;
  memcpy(&bits, &score, sizeof bits);
  const Key sign = Key{1} << (kAccBits - 1);
  return (bits & sign ? ~bits : bits | sign) >> (kAccBits - RouteKey<T>::kBits);
}

struct RouteRange {
  int64_t begin, end;
};

__device__ __forceinline__ RouteRange route_range(const RouteTopkArgs& args, int64_t b) {
  const int64_t begin = min(max(int64_t{args.cu_seqlens[b]}, int64_t{0}), args.num_rows);
  return {begin, min(max(int64_t{args.cu_seqlens[b + 1]}, begin), args.num_rows)};
}

__device__ __forceinline__ bool route_protected(const RouteTopkArgs& args, int64_t row) {
  return args.protected_rows != nullptr && args.protected_rows[row] != 0;
}
__device__ __forceinline__ bool route_competes(const RouteTopkArgs& args, int64_t row) {
  return (args.candidates == nullptr || args.candidates[row] != 0) && !route_protected(args, row);
}
__device__ __forceinline__ int64_t route_clamped_k(const RouteTopkArgs& args, int64_t b,
                                                   int64_t available) {
  return min(max(args.k_each != nullptr ? args.k_each[b] : args.k, int64_t{0}), available);
}

// Rows are counted in 32 bits (cu_seqlens has no more), or the scan of 1024 threads would spill.
using RouteScan = cub::BlockScan<int, kRouteThreads>;

struct RouteShared {
  typename RouteScan::TempStorage scan;
  int histogram[kRouteBins];
  int digit;
  int64_t need;
};

// The sum over the block, for every thread.
__device__ __forceinline__ int route_sum(RouteShared& shared, int value) {
  int before, total;
  RouteScan(shared.scan).ExclusiveSum(value, before, total);
  __syncthreads();
  return total;
}

// With masks only: one block counts the rows that compete and that are protected in a sequence.
static __global__ void __launch_bounds__(kRouteThreads)
    route_topk_count_kernel(RouteTopkArgs args) {
  MOR_DYN_SMEM(raw);
  RouteShared& shared = *reinterpret_cast<RouteShared*>(raw);
  for (int64_t b = blockIdx.x; b < args.num_sequences; b += gridDim.x) {
    const RouteRange range = route_range(args, b);
    int competing = 0, kept = 0;
    for (int64_t row = range.begin + threadIdx.x; row < range.end; row += kRouteThreads) {
      competing += route_competes(args, row);
      kept += route_protected(args, row);
    }
    competing = route_sum(shared, competing);
    kept = route_sum(shared, kept);
    if (threadIdx.x == 0) {
      args.taken[b] = route_clamped_k(args, b, competing);
      args.totals[b] = args.taken[b] + kept;
    }
  }
}

// ++histogram[digit] for the threads with `counted`. A warp whose lanes agree (many equal scores)
// adds once.
__device__ __forceinline__ void route_count_digit(int* histogram, bool counted, int digit) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const unsigned voters = __ballot_sync(kAll, counted);
  if (voters == 0) return;
  const int leader = __ffs(static_cast<int>(voters)) - 1;
  const int leading = __shfl_sync(kAll, digit, leader);
  const unsigned same = __ballot_sync(kAll, counted && digit == leading);
  if (lane == leader) atomicAdd(&histogram[leading], __popc(same));
  if (counted && digit != leading) atomicAdd(&histogram[digit], 1);
}

// The key of the `need`-th best row that competes (need >= 1); need becomes how many rows with that
// very key are wanted.
template <class T>
__device__ typename RouteKey<T>::type route_select(const RouteTopkArgs& args, RouteShared& shared,
                                                   const T* scores, RouteRange range,
                                                   int64_t& need) {
  using Key = typename RouteKey<T>::type;
  const int thread = threadIdx.x;
  Key prefix = 0;
  for (int shift = RouteKey<T>::kBits - 8; shift >= 0; shift -= 8) {
    if (thread < kRouteBins) shared.histogram[thread] = 0;
    __syncthreads();
    for (int64_t first = range.begin; first < range.end; first += kRouteThreads) {
      const int64_t row = first + thread;
      bool counted = row < range.end && route_competes(args, row);
      const Key key = counted ? static_cast<Key>(route_key(scores[row]) >> shift) : Key{0};
      counted = counted && key >> 8 == prefix;
      route_count_digit(shared.histogram, counted, static_cast<int>(key & 255));
    }
    __syncthreads();
    const int bin = kRouteBins - 1 - thread;  // best digit first
    const int count = bin >= 0 ? shared.histogram[bin] : 0;
    int before;
    RouteScan(shared.scan).ExclusiveSum(count, before);
    if (before < need && need <= before + count) {
      shared.digit = bin;
      shared.need = need - before;
    }
    __syncthreads();
    prefix = prefix << 8 | static_cast<Key>(shared.digit);
    need = shared.need;
  }
  return prefix;
}

// One block, one sequence at a time; a thread owns every kRouteThreads-th row.
template <class T>
__global__ void __launch_bounds__(kRouteThreads)
    route_topk_kernel(const T* scores, RouteTopkArgs args) {
  using Key = typename RouteKey<T>::type;
  MOR_DYN_SMEM(raw);
  RouteShared& shared = *reinterpret_cast<RouteShared*>(raw);
  for (int64_t b = blockIdx.x; b < args.num_sequences; b += gridDim.x) {
    int64_t earlier_rows = 0;
    for (int64_t earlier = threadIdx.x; earlier < b; earlier += kRouteThreads) {
      const RouteRange other = route_range(args, earlier);
      earlier_rows += args.totals != nullptr
                          ? args.totals[earlier]
                          : route_clamped_k(args, earlier, other.end - other.begin);
    }
    const int64_t start = route_sum(shared, int(earlier_rows));
    const RouteRange range = route_range(args, b);
    const int64_t taken =
        args.taken != nullptr ? args.taken[b] : route_clamped_k(args, b, range.end - range.begin);
    int64_t ties = taken;
    const Key threshold = taken > 0 ? route_select<T>(args, shared, scores, range, ties) : Key{0};
    int64_t above_before = 0, equal_before = 0;
    for (int64_t first = range.begin; first < range.end; first += kRouteThreads) {
      const int64_t row = first + threadIdx.x;
      bool above = false, equal = false;
      if (row < range.end) {
        above = route_protected(args, row);
        if (taken > 0 && route_competes(args, row)) {
          const Key key = route_key(scores[row]);
          above = key > threshold;
          equal = key == threshold;
        }
      }
      // Both counts in one scan: 16 bits hold those of a tile.
      int before, total;
      RouteScan(shared.scan).ExclusiveSum(int{above} << 16 | int{equal}, before, total);
      const int64_t earlier_equal = equal_before + (before & 0xffff);
      const int64_t place = start + above_before + (before >> 16) + min(earlier_equal, ties);
      if ((above || (equal && earlier_equal < ties)) && place < args.num_selected)
        args.rows[place] = row;
      above_before += total >> 16;
      equal_before += total & 0xffff;
      __syncthreads();
    }
    const int64_t stop = min(start + above_before + min(equal_before, ties), args.num_selected);
    if (args.starts != nullptr && threadIdx.x == 0) {
      args.starts[b] = min(start, args.num_selected);
      if (b == args.num_sequences - 1) args.starts[b + 1] = stop;
    }
    if (b == args.num_sequences - 1) {
      for (int64_t i = stop + threadIdx.x; i < args.num_selected; i += kRouteThreads)
        args.rows[i] = args.fill;
    }
  }
}

// Best first: a thread owns one row of `ascending` and counts the rows of its sequence that go
// before it. O(k) for each row, which is enough for what looks at ranks.
template <class T>
__global__ void route_topk_rank_kernel(const T* scores, const int64_t* ascending,
                                       RouteTopkArgs args) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.num_selected;
       i += stride) {
    int64_t low = 0, high = args.num_sequences;  // the last sequence that starts at or before i
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (args.starts[middle] <= i) low = middle;
      else high = middle;
    }
    const int64_t first = args.starts[low], last = args.starts[low + 1];
    if (i >= last) {
      args.rows[i] = ascending[i];
      continue;
    }
    const auto key = route_key(scores[ascending[i]]);
    int64_t rank = 0;
    for (int64_t j = first; j < last; ++j) {
      const auto other = route_key(scores[ascending[j]]);
      rank += other > key || (other == key && j < i);
    }
    args.rows[first + rank] = ascending[i];
  }
}

// `ascending` is scratch of num_selected rows for by_score, or null.
template <class T>
cudaError_t launch_route_topk(const T* scores, RouteTopkArgs args, int64_t* ascending,
                              cudaStream_t stream) {
  if (args.num_sequences == 0) return cudaSuccess;
  const unsigned grid = grid_for(args.num_sequences, 1);
  if (args.taken != nullptr) {
    MOR_LAUNCH(route_topk_count_kernel, grid, kRouteThreads, sizeof(RouteShared), stream, args);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  RouteTopkArgs select = args;
  if (ascending != nullptr) select.rows = ascending;
  auto kernel = route_topk_kernel<T>;
  MOR_LAUNCH(kernel, grid, kRouteThreads, sizeof(RouteShared), stream, scores, select);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (ascending == nullptr) return cudaSuccess;
  auto rank = route_topk_rank_kernel<T>;
  MOR_LAUNCH(rank, grid_for(args.num_selected, 256), 256, 0, stream, scores, ascending, args);
  return cudaGetLastError();
}

}  // namespace mor
