// Rows of a matrix on warps: a warp owns a row at a time, and moves it in 16-byte accesses where
// every row allows that.
#pragma once

#include "../common.cuh"

namespace mor {

constexpr int kRowThreads = 256;  // eight warps, each on a row of its own

// The row (or update) of this warp, and the distance to its next one.
__device__ __forceinline__ int64_t row_item() {
  return (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32;
}
__device__ __forceinline__ int64_t row_item_step() {
  return int64_t(gridDim.x) * (kRowThreads / 32);
}
inline unsigned row_grid(int64_t count) { return grid_for(count, kRowThreads / 32); }

// kPack elements that travel in one access.
template <class T, int kPack>
struct alignas(kPack * sizeof(T)) Pack {
  T v[kPack];
};

// Elements of a 16-byte access where every row of every operand allows it, else 1; `bits` is the
// bitwise or of all addresses and row strides in bytes.
template <class T>
bool packs(uintptr_t bits, int64_t width) {
  return (bits | uintptr_t(width) * sizeof(T)) % 16 == 0;
}
template <class T>
uintptr_t row_bits(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) | uintptr_t(stride) * sizeof(T);
}

}  // namespace mor
