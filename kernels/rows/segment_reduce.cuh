// Rows of one segment become one: the contract is in csrc/ops/segment_reduce.h. As row_sums.cuh
// adds rows: a warp owns a segment and walks its rows in ascending order, so no atomics on floats.
#pragma once

#include "row_sums.cuh"

namespace mor {

// Numbers, not an enumeration: they stand in the kernels' names, for kernels/budgets.json.
constexpr int kSegmentSum = 0, kSegmentMean = 1, kSegmentAmax = 2;

// Strides in elements; out and grad_x are packed.
template <class T>
struct SegmentReduceArgs {
  T* out;            // [S, D]; only read in the backward of amax
  acc_t<T>* totals;  // [S], kSegmentMean only
  const T* x;
  int64_t x_stride;
  RowFactor<T> weights;
  const int64_t* segments;
  int64_t num_rows, num_segments, width;
  int* first;  // [S], see RowSums
  int* last;   // [S]
};

template <class T>
struct SegmentAmaxBackwardArgs {
  const T* grad;
  int64_t grad_stride;
  const T* x;
  int64_t x_stride;
  const T* out;
  int64_t out_stride;
  const int64_t* segments;
  T* grad_x;
  int64_t num_rows, num_segments, width;
  int* first;
  int* last;
};

template <int kKind, class T, int kPack>
__device__ __forceinline__ void reduce_row(const SegmentReduceArgs<T>& a, int64_t i, bool is_first,
                                           int64_t d, acc_t<T> (&acc)[kPack]) {
  const auto row = *reinterpret_cast<const Pack<T, kPack>*>(a.x + i * a.x_stride + d);
  const acc_t<T> weight = a.weights.at(i);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const acc_t<T> v = to_acc(row.v[k]);
    if constexpr (kKind == kSegmentAmax) {
      acc[k] = is_first || v > acc[k] || v != v ? v : acc[k];
    } else {
      acc[k] += weight * v;
    }
  }
}

// A warp owns one segment at a time, a lane kPack elements of every 32 * kPack. Six blocks, as
// kernels/budgets.json states: left to itself ptxas spills the mean on sm_80 to hold eight.
template <class T, int kPack, int kKind>
__global__ void __launch_bounds__(kRowThreads, 6) segment_reduce_kernel(SegmentReduceArgs<T> a) {
  const int lane = threadIdx.x % 32;
  for (int64_t s = row_item(); s < a.num_segments; s += row_item_step()) {
    const int first = a.first[s], last = a.last[s];
    acc_t<T> total = 0;
    if constexpr (kKind == kSegmentMean) {
      for_each_index(a.segments, s, first, last, [&](int64_t i) { total += a.weights.at(i); });
      if (lane == 0) a.totals[s] = total;
    }
    for (int64_t begin = 0; begin < a.width; begin += 32 * kPack) {
      const int64_t d = begin + lane * kPack;
      const bool active = d < a.width;
      acc_t<T> acc[kPack]{};
      for_each_index(a.segments, s, first, last, [&](int64_t i) {
        if (active) reduce_row<kKind, T, kPack>(a, i, i == first, d, acc);
      });
      if (active) {
        Pack<T, kPack> out;
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          if constexpr (kKind == kSegmentMean) acc[k] = total == 0 ? 0 : acc[k] / total;
          out.v[k] = from_acc<T>(acc[k]);
        }
        *reinterpret_cast<Pack<T, kPack>*>(a.out + s * a.width + d) = out;
      }
    }
  }
}

// A warp owns the rows of one segment: a column's gradient goes to the first row of its maximum.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    segment_amax_backward_kernel(SegmentAmaxBackwardArgs<T> a) {
  using Values = Pack<T, kPack>;
  const int lane = threadIdx.x % 32;
  for (int64_t s = row_item(); s < a.num_segments; s += row_item_step()) {
    const int first = a.first[s], last = a.last[s];
    for (int64_t begin = 0; begin < a.width; begin += 32 * kPack) {
      const int64_t d = begin + lane * kPack;
      const bool active = d < a.width;
      Values out{}, rest{};
      if (active) {
        out = *reinterpret_cast<const Values*>(a.out + s * a.out_stride + d);
        rest = *reinterpret_cast<const Values*>(a.grad + s * a.grad_stride + d);
      }
      for_each_index(a.segments, s, first, last, [&](int64_t i) {
        if (!active) return;
        const Values x = *reinterpret_cast<const Values*>(a.x + i * a.x_stride + d);
        Values given;
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const acc_t<T> v = to_acc(x.v[k]), top = to_acc(out.v[k]);
          const bool largest = v == top || (v != v && top != top);
          given.v[k] = largest ? rest.v[k] : from_acc<T>(0);
          if (largest) rest.v[k] = from_acc<T>(0);  // given away: later equals get none
        }
        *reinterpret_cast<Values*>(a.grad_x + i * a.width + d) = given;
      });
    }
  }
}

// scratch [2 S] int; num_rows below 2^31. totals null unless kind is kSegmentMean.
template <class T>
cudaError_t launch_segment_reduce(SegmentReduceArgs<T> a, int kind, int* scratch,
                                  cudaStream_t stream) {
  if (a.num_segments == 0) return cudaSuccess;
  a.first = scratch;
  a.last = scratch + a.num_segments;
  launch_mark_ranges(a.segments, a.num_rows, a.num_segments, a.first, a.last, stream);
  constexpr int kPack = 16 / sizeof(T);
  const bool packed = packs<T>(row_bits(a.out, a.width) | row_bits(a.x, a.x_stride), a.width);
  const auto kernel = kind == kSegmentSum ? (packed ? segment_reduce_kernel<T, kPack, kSegmentSum>
                                                    : segment_reduce_kernel<T, 1, kSegmentSum>)
                      : kind == kSegmentMean
                          ? (packed ? segment_reduce_kernel<T, kPack, kSegmentMean>
                                    : segment_reduce_kernel<T, 1, kSegmentMean>)
                          : (packed ? segment_reduce_kernel<T, kPack, kSegmentAmax>
                                    : segment_reduce_kernel<T, 1, kSegmentAmax>);
  MOR_LAUNCH(kernel, row_grid(a.num_segments), kRowThreads, 0, stream, a);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_segment_amax_backward(SegmentAmaxBackwardArgs<T> a, int* scratch,
                                         cudaStream_t stream) {
  if (a.num_segments == 0 || a.num_rows == 0 || a.width == 0) return cudaSuccess;
  a.first = scratch;
  a.last = scratch + a.num_segments;
  launch_mark_ranges(a.segments, a.num_rows, a.num_segments, a.first, a.last, stream);
  const uintptr_t bits = row_bits(a.grad, a.grad_stride) | row_bits(a.x, a.x_stride) |
                         row_bits(a.out, a.out_stride) | row_bits(a.grad_x, a.width);
  const auto kernel = packs<T>(bits, a.width) ? segment_amax_backward_kernel<T, 16 / sizeof(T)>
                                              : segment_amax_backward_kernel<T, 1>;
  MOR_LAUNCH(kernel, row_grid(a.num_segments), kRowThreads, 0, stream, a);
  return cudaGetLastError();
}

}  // namespace mor
