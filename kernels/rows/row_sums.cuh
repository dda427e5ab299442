// Adding rows to rows, deterministic for any index list, without float atomics, a sort or
// synchronisation with the host: shared by the backward of gather_tokens, by scatter_tokens and by
// segment_reduce.
//
// Integer atomics find the first and the last update of every row (minimum and maximum do not
// depend on the order of arrival). A row with one update (every row after route_topk) adds it. A
// row with more walks its updates in the order of i and looks for them in rows[first .. last].
// The cost is a scratch of 8 bytes a row, written once and read once, two integer atomics an
// update, and two launches more than a kernel that knows that rows are unique; the sum itself moves
// base, updates and out once. A row whose updates lie s apart reads s indices (8 bytes each, from
// cache) for every 512 bytes of the row. So updates that all repeat at distance K/2 read K * K / 4
// indices, which is correct, but slow for K above some 10^5.
#pragma once

#include "rows.cuh"

namespace mor {

// One factor for each row, float or T; absent, the factor is 1.
template <class T>
struct RowFactor {
  const void* data;
  bool is_float;
  int64_t stride;

  __device__ __forceinline__ acc_t<T> at(int64_t i) const {
    if (data == nullptr) return acc_t<T>(1);
    if (is_float) return acc_t<T>(static_cast<const float*>(data)[i * stride]);
    return to_acc(static_cast<const T*>(data)[i * stride]);
  }
};

// out[n] = base_scale[n] * base[n] + sum of gate[i] * updates[i] over rows[i] == n; strides in
// elements.
template <class T>
struct RowSums {
  T* out;
  int64_t out_stride;
  const T* base;  // null: zeros; may be out
  int64_t base_stride;
  RowFactor<T> base_scale;
  const T* updates;
  int64_t updates_stride;
  RowFactor<T> gate;
  const int64_t* rows;
  int64_t num_rows, num_updates, width;
  int* first;  // [N] smallest i with rows[i] == n, else INT32_MAX
  int* last;   // [N] largest, else -1
};

// One thread a row.
static __global__ void clear_ranges_kernel(int* first, int* last, int64_t num_rows) {
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < num_rows;
       n += int64_t(gridDim.x) * blockDim.x) {
    first[n] = INT32_MAX;
    last[n] = -1;
  }
}

// One thread an update.
static __global__ void mark_ranges_kernel(const int64_t* rows, int64_t num_updates, int* first,
                                          int* last) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < num_updates;
       i += int64_t(gridDim.x) * blockDim.x) {
    atomicMin(first + rows[i], int(i));
    atomicMax(last + rows[i], int(i));
  }
}

// Calls body(i) for every i with rows[i] == n, ascending, the whole warp together. first and last
// are those of n; without an update, last is -1.
template <class Body>
__device__ __forceinline__ void for_each_index(const int64_t* rows, int64_t n, int first, int last,
                                               Body&& body) {
  if (last < 0) return;
  body(int64_t(first));
  const int lane = threadIdx.x % 32;
  for (int64_t i = int64_t(first) + 1; i <= last; i += 32) {
    const bool is_n = i + lane <= last && rows[i + lane] == n;
    for (unsigned found = __ballot_sync(~0u, is_n); found != 0; found &= found - 1)
      body(i + __ffs(int(found)) - 1);
  }
}

template <class T, int kPack>
__device__ __forceinline__ void add_update(const RowSums<T>& s, int64_t i, int64_t d,
                                           acc_t<T> (&acc)[kPack]) {
  const acc_t<T> gate = s.gate.at(i);
  const auto update =
      *reinterpret_cast<const Pack<T, kPack>*>(s.updates + i * s.updates_stride + d);
#pragma unroll
  for (int k = 0; k < kPack; ++k) acc[k] += gate * to_acc(update.v[k]);
}

// A warp owns one output row at a time, a lane kPack elements of every 32 * kPack. With
// kOnlyUpdated, items are updates, the first update of a row brings its warp, and other rows stay
// as they are (in place).
template <class T, int kPack, bool kOnlyUpdated>
__global__ void __launch_bounds__(kRowThreads) sum_rows_kernel(RowSums<T> s) {
  const int lane = threadIdx.x % 32;
  const int64_t count = kOnlyUpdated ? s.num_updates : s.num_rows;
  for (int64_t item = row_item(); item < count; item += row_item_step()) {
    const int64_t n = kOnlyUpdated ? s.rows[item] : item;
    const int first = s.first[n], last = s.last[n];
    if (kOnlyUpdated && first != item) continue;
    const acc_t<T> scale = s.base_scale.at(n);
    for (int64_t begin = 0; begin < s.width; begin += 32 * kPack) {
      const int64_t d = begin + lane * kPack;
      const bool active = d < s.width;
      acc_t<T> acc[kPack]{};
      if (active && s.base != nullptr) {
        const auto base = *reinterpret_cast<const Pack<T, kPack>*>(s.base + n * s.base_stride + d);
#pragma unroll
        for (int k = 0; k < kPack; ++k) acc[k] = scale * to_acc(base.v[k]);
      }
      for_each_index(s.rows, n, first, last, [&](int64_t i) {
        if (active) add_update<T, kPack>(s, i, d, acc);
      });
      if (active) {
        Pack<T, kPack> out;
#pragma unroll
        for (int k = 0; k < kPack; ++k) out.v[k] = from_acc<T>(acc[k]);
        *reinterpret_cast<Pack<T, kPack>*>(s.out + n * s.out_stride + d) = out;
      }
    }
  }
}

// Writes the first and last update of every row to first and last.
inline void launch_mark_ranges(const int64_t* rows, int64_t num_updates, int64_t num_rows,
                               int* first, int* last, cudaStream_t stream) {
  MOR_LAUNCH(clear_ranges_kernel, grid_for(num_rows, 256), 256, 0, stream, first, last, num_rows);
  if (num_updates > 0) {
    MOR_LAUNCH(mark_ranges_kernel, grid_for(num_updates, 256), 256, 0, stream, rows, num_updates,
               first, last);
  }
}

// scratch [2 N] int; num_updates below 2^31. Where out is base and nothing scales it, only rows
// with an update are touched.
template <class T>
cudaError_t launch_row_sums(RowSums<T> s, int* scratch, cudaStream_t stream) {
  const bool only_updated = s.out == s.base && s.base_scale.data == nullptr;
  if (s.num_rows == 0 || s.width == 0 || (only_updated && s.num_updates == 0)) return cudaSuccess;
  s.first = scratch;
  s.last = scratch + s.num_rows;
  launch_mark_ranges(s.rows, s.num_updates, s.num_rows, s.first, s.last, stream);
  const uintptr_t bits = row_bits(s.out, s.out_stride) | row_bits(s.base, s.base_stride) |
                         row_bits(s.updates, s.updates_stride);
  constexpr int kPack = 16 / sizeof(T);
  const auto kernel =
      packs<T>(bits, s.width)
          ? (only_updated ? sum_rows_kernel<T, kPack, true> : sum_rows_kernel<T, kPack, false>)
          : (only_updated ? sum_rows_kernel<T, 1, true> : sum_rows_kernel<T, 1, false>);
  MOR_LAUNCH(kernel, row_grid(only_updated ? s.num_updates : s.num_rows), kRowThreads, 0, stream,
             s);
  return cudaGetLastError();
}

}  // namespace mor
