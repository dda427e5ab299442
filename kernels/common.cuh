// What every kernel file includes: the one place that knows whether nvcc or the SIMT harness
// compiles it. No torch header here or in any .cuh.
#pragma once

#if !defined(MOR_SIMT)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MOR_LAUNCH(KERNEL, GRID, BLOCK, SMEM, STREAM, ...) \
  KERNEL<<<(GRID), (BLOCK), (SMEM), (STREAM)>>>(__VA_ARGS__)
#define MOR_DYN_SMEM(NAME) extern __shared__ __align__(128) unsigned char NAME[]
#define MOR_MOST_BLOCKS 65535  // of a grid-stride loop
#endif

#include <cstdint>

namespace mor {

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}

// Enough blocks of `threads` for `count` items, bounded: kernels loop over the grid.
inline unsigned grid_for(int64_t count, int threads) {
  const int64_t blocks = (count + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1                 ? 1
                               : blocks > MOR_MOST_BLOCKS ? MOR_MOST_BLOCKS
                                                          : blocks);
}

}  // namespace mor
