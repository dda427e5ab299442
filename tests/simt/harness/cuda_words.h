// CUDA C++'s device vocabulary for the host compiler, included before every kernel source. Types
// and host-callable math come from the toolkit's own headers; this adds what nvcc has built in.
// Left out on purpose: __activemask (its value depends on scheduling: kernels pass masks).
#pragma once

#include <cuda_runtime_api.h>
#include <device_launch_parameters.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "simt.h"

#define MOR_SIMT 1

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// Blocks run one after another, so one copy is enough.
#define __shared__ static

#define SIMT_SITE ::simt::Site site = ::simt::Site::here()
#define SIMT_UNINSTRUMENTED __attribute__((no_sanitize("thread"), noinline))

namespace simt {

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int b, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("shuffle of a width that is no power of two up to 32 at " + text(site));
  }
  const int c = (32 - width) << 8 | (op == WarpOp::kShuffleUp ? 0 : 31);
  return unpack<T>(warp_collective(op, mask, pack(value), b, c, site).value);
}

template <class T>
T reduce(WarpOp op, unsigned mask, T value, Site site) {
  return T(warp_collective(op, mask, uint32_t(value), 0, 0, site).value);
}

// Threads switch only where they meet, so a plain update is atomic; the race checker is told so.
template <class T, class Update>
SIMT_UNINSTRUMENTED T atomic(T* p, Update update) {
  if (hooks.access != nullptr) {
    hooks.access(p, sizeof(T), true, true, __builtin_return_address(0));
  }
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace simt

// Barriers and fences.
inline void __syncthreads(SIMT_SITE) { ::simt::barrier(::simt::BarrierOp::kSync, 0, site); }
inline int __syncthreads_count(int p, SIMT_SITE) {
  return ::simt::barrier(::simt::BarrierOp::kCount, p, site);
}
inline int __syncthreads_and(int p, SIMT_SITE) {
  return ::simt::barrier(::simt::BarrierOp::kAnd, p, site);
}
inline int __syncthreads_or(int p, SIMT_SITE) {
  return ::simt::barrier(::simt::BarrierOp::kOr, p, site);
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
  ::simt::warp_collective(::simt::WarpOp::kSync, mask, 0, 0, 0, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { ::simt::yield(); }
[[noreturn]] inline void __trap(SIMT_SITE) { ::simt::fail("__trap at " + ::simt::text(site)); }

// Shuffles, votes, matches, reductions.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
  return ::simt::shuffle(::simt::WarpOp::kShuffleIndex, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return ::simt::shuffle(::simt::WarpOp::kShuffleUp, mask, value, int(delta), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return ::simt::shuffle(::simt::WarpOp::kShuffleDown, mask, value, int(delta), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
  return ::simt::shuffle(::simt::WarpOp::kShuffleXor, mask, value, lanes, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) {
  return ::simt::reduce<unsigned>(::simt::WarpOp::kBallot, mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, SIMT_SITE) { return __ballot_sync(mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_SITE) {
  return __ballot_sync(mask, p, site) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
  return unsigned(
      ::simt::warp_collective(::simt::WarpOp::kMatchAny, mask, ::simt::pack(value), 0, 0, site)
          .value);
}
#define SIMT_REDUCE(NAME, OP, T)                                  \
  inline T NAME(unsigned mask, T value, SIMT_SITE) {              \
    return ::simt::reduce(::simt::WarpOp::OP, mask, value, site); \
  }
SIMT_REDUCE(__reduce_add_sync, kAdd, unsigned)
SIMT_REDUCE(__reduce_add_sync, kAdd, int)
SIMT_REDUCE(__reduce_min_sync, kMin, unsigned)
SIMT_REDUCE(__reduce_min_sync, kMinSigned, int)
SIMT_REDUCE(__reduce_max_sync, kMax, unsigned)
SIMT_REDUCE(__reduce_max_sync, kMaxSigned, int)
SIMT_REDUCE(__reduce_and_sync, kAnd, unsigned)
SIMT_REDUCE(__reduce_or_sync, kOr, unsigned)
SIMT_REDUCE(__reduce_xor_sync, kXor, unsigned)

// Atomics.
#define SIMT_ATOMIC(NAME, T, RESULT)                                         \
  inline T NAME(T* p, T v) {                                                 \
    return ::simt::atomic(p, [v](T old) { return static_cast<T>(RESULT); }); \
  }
#define SIMT_ATOMICS(T)                                                         \
  SIMT_ATOMIC(atomicAdd, T, old + v)                                            \
  SIMT_ATOMIC(atomicMin, T, v < old ? v : old)                                  \
  SIMT_ATOMIC(atomicMax, T, old < v ? v : old)                                  \
  SIMT_ATOMIC(atomicExch, T, v)                                                 \
  SIMT_ATOMIC(atomicAnd, T, old& v)                                             \
  SIMT_ATOMIC(atomicOr, T, old | v)                                             \
  SIMT_ATOMIC(atomicXor, T, old ^ v)                                            \
  inline T atomicCAS(T* p, T expected, T v) {                                   \
    return ::simt::atomic(p, [=](T old) { return old == expected ? v : old; }); \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
SIMT_ATOMIC(atomicSub, int, old - v)
SIMT_ATOMIC(atomicSub, unsigned, old - v)
SIMT_ATOMIC(atomicAdd, float, old + v)
SIMT_ATOMIC(atomicAdd, double, old + v)

// Integers and bits.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x != 0 ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> (4 * i) & 15;
    unsigned byte = unsigned(bytes >> (8 * (selector & 7))) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __float_as_uint(float x) { return ::simt::unpack<unsigned>(::simt::pack(x)); }
inline int __float_as_int(float x) { return ::simt::unpack<int>(::simt::pack(x)); }
inline float __uint_as_float(unsigned x) { return ::simt::unpack<float>(::simt::pack(x)); }
inline float __int_as_float(int x) { return ::simt::unpack<float>(::simt::pack(x)); }
#define SIMT_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
SIMT_MIN_MAX(float)
SIMT_MIN_MAX(double)

// Pairs of 16-bit integers: CUB names them, no kernel of ours reaches them.
#define SIMT_NOT_EMULATED(NAME) \
  inline unsigned NAME(unsigned, unsigned) { ::simt::fail(#NAME " is not emulated"); }
SIMT_NOT_EMULATED(__vmins2)
SIMT_NOT_EMULATED(__vminu2)
SIMT_NOT_EMULATED(__vmaxs2)
SIMT_NOT_EMULATED(__vmaxu2)

// Floats: IEEE results; the GPU's approximations differ in the last bits.
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Special registers, which CUB asks for.
namespace simt {
inline unsigned lane_id() { return self->lane; }
inline unsigned warp_id() { return self->warp; }
inline unsigned lanes_below() { return (1u << self->lane) - 1; }
inline unsigned lanes_up_to() { return 2u * (1u << self->lane) - 1; }
}  // namespace simt

// Launches.
namespace simt {

template <class T>
Dim to_dim(T size) {
  if constexpr (std::is_integral_v<T>) {
    return {unsigned(size), 1, 1};
  } else {
    return {size.x, size.y, size.z};
  }
}

// kernel<<<grid, block, bytes, stream>>>(args...) as a function, which CUB's own launches become.
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t bytes,
                          cudaStream_t, Args&&... args) {
  const std::tuple<std::decay_t<Params>...> values{static_cast<std::decay_t<Params>>(args)...};
  launch("kernel of CUB", reinterpret_cast<const void*>(kernel), to_dim(grid), to_dim(block), bytes,
         [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

}  // namespace simt

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    ::simt::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), size_t(value));
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return ::cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  return ::simt::launch_kernel(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                               config->stream, args...);
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

#define MOR_LAUNCH(KERNEL, GRID, BLOCK, SMEM, STREAM, ...)                                 \
  ((void)(STREAM),                                                                         \
   ::simt::launch(#KERNEL, reinterpret_cast<const void*>(+(KERNEL)), ::simt::to_dim(GRID), \
                  ::simt::to_dim(BLOCK), (SMEM), [&] { (KERNEL)(__VA_ARGS__); }))
#define MOR_DYN_SMEM(NAME) unsigned char* NAME = ::simt::dynamic_shared()
#define MOR_MOST_BLOCKS 2  // so few that every grid-stride loop goes round
