// Kernels with one mistake each, to see that the harness reports it, and a correct one of CUB. Called
// by ctypes (test_simt_harness.py): every function returns 0, or 1 and leaves the reason in
// simt_error().
#include <cuda_runtime_api.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>
#include <exception>
#include <string>

#include "../../kernels/attention/mma.cuh"
#include "../../kernels/common.cuh"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string last_error;

template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void barrier_after_return(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shuffle_with_lanes_missing(int* out) {
  int value = int(threadIdx.x);
  if (threadIdx.x < 20) value = __shfl_down_sync(~0u, value, 1);
  out[threadIdx.x] = value;
}

__global__ void different_collectives(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __any_sync(~0u, 1) : __shfl_sync(~0u, 1, 0);
}

// Right in ascending order only, and a race in any.
__global__ void missing_barrier(int* out) {
  MOR_DYN_SMEM(raw);
  int* shared = reinterpret_cast<int*>(raw);
  shared[threadIdx.x] = int(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}

__global__ void missing_syncwarp(int* out) {
  MOR_DYN_SMEM(raw);
  int* shared = reinterpret_cast<int*>(raw);
  shared[threadIdx.x] = int(threadIdx.x);
  __shfl_sync(~0u, 0, 0);  // meets, but orders no memory
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void blocks_write_one_word(int* out) { out[threadIdx.x] = int(blockIdx.x); }

__global__ void unwritten_shared(int* out) {
  MOR_DYN_SMEM(raw);
  out[threadIdx.x] = reinterpret_cast<int*>(raw)[threadIdx.x];
}

__global__ void too_much_shared(int* out) { out[threadIdx.x] = 1; }

__global__ void past_the_end(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void copy_without_wait(const int* in, int* out) {
  MOR_DYN_SMEM(raw);
  mor::cp_async16(raw + threadIdx.x * 16, in + threadIdx.x * 4, true);
  mor::cp_async_commit();
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<int*>(raw)[threadIdx.x];
}

// out = the values in[0, 256) sorted, then their exclusive prefix sums.
__global__ void sort_and_scan(const int* in, int* out) {
  using Sort = cub::BlockRadixSort<int, 64, 4>;
  using Scan = cub::BlockScan<int, 64>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Scan::TempStorage scan;
  } shared;
  int values[4];
  for (int i = 0; i < 4; ++i) values[i] = in[threadIdx.x * 4 + i];
  Sort(shared.sort).Sort(values);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = values[i];
  __syncthreads();
  Scan(shared.scan).ExclusiveSum(values, values);
  for (int i = 0; i < 4; ++i) out[256 + threadIdx.x * 4 + i] = values[i];
}

}  // namespace

SIMT_EXPORT const char* simt_error() { return last_error.c_str(); }

#define SELFTEST(KERNEL, GRID, BLOCK, SMEM)                                       \
  SIMT_EXPORT int selftest_##KERNEL(int* out) {                                   \
    return guarded([&] { MOR_LAUNCH(KERNEL, GRID, BLOCK, SMEM, nullptr, out); }); \
  }
SELFTEST(divergent_barrier, 1, 64, 0)
SELFTEST(barrier_after_return, 1, 64, 0)
SELFTEST(shuffle_with_lanes_missing, 1, 32, 0)
SELFTEST(different_collectives, 1, 32, 0)
SELFTEST(missing_barrier, 1, 64, 64 * 4)
SELFTEST(missing_syncwarp, 1, 32, 32 * 4)
SELFTEST(blocks_write_one_word, 2, 32, 0)
SELFTEST(unwritten_shared, 1, 32, 32 * 4)
SELFTEST(past_the_end, 1, 64, 0)
SELFTEST(too_much_shared, 1, 64, 49 * 1024)

SIMT_EXPORT int selftest_copy_without_wait(const int* in, int* out) {
  return guarded([&] { MOR_LAUNCH(copy_without_wait, 1, 32, 512, nullptr, in, out); });
}
SIMT_EXPORT int selftest_sort_and_scan(const int* in, int* out) {
  return guarded([&] { MOR_LAUNCH(sort_and_scan, 1, 64, 0, nullptr, in, out); });
}
