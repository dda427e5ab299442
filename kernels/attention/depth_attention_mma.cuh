// Products of tiles in shared memory on tensor cores. Tiles hold rows of 16-bit numbers; a warp
// works on 16 rows, of which lane l holds rows g = l / 4 and g + 8, columns 2 * (l % 4) and the
// next of every 8 (kernels/mma.cuh).
#pragma once

#include "depth_attention_masks.cuh"
#include "mma.cuh"

namespace mor {

// Chunks of 8 numbers (16 bytes) are permuted within a row, so that ldmatrix, which reads one chunk
// of 8 neighbouring rows at a time, meets 8 different groups of banks.
template <class T, int ROWS, int HEAD_DIM>
struct __align__(128) MmaTile {
  T data[ROWS * HEAD_DIM];

  __device__ __forceinline__ T* chunk(int row, int c) {
    return data + row * HEAD_DIM + ((c ^ (row & 7)) << 3);
  }
  __device__ __forceinline__ const T* chunk(int row, int c) const {
    return data + row * HEAD_DIM + ((c ^ (row & 7)) << 3);
  }
};

// Starts filling a tile from global rows; row(r) is null for rows that do not exist, which become
// zeros, as does what pads head_dim.
template <class T, int ROWS, int HEAD_DIM, class Row>
__device__ __forceinline__ void load_rows_async(MmaTile<T, ROWS, HEAD_DIM>& tile,
                                                const DepthAttention<T>& p, Row&& row) {
  constexpr int kPerRow = HEAD_DIM / 8;
  for (int i = threadIdx.x; i < ROWS * kPerRow; i += blockDim.x) {
    const int r = i / kPerRow, c = i % kPerRow;
    const T* from = row(r);
    T* to = tile.chunk(r, c);
    if (p.aligned) {
      const bool exists = from != nullptr && 8 * c < p.head_dim;
      cp_async16(to, exists ? from + 8 * c : p.q.data, exists);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        to[e] = from != nullptr && 8 * c + e < p.head_dim ? from[8 * c + e] : T(0.f);
      }
    }
  }
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// sums[16, N] = left rows first .. first + 15 times the transposed right rows
template <class T, int M, int N, int HEAD_DIM>
__device__ __forceinline__ void dot_rows(float (&sums)[N / 8][4],
                                         const MmaTile<T, M, HEAD_DIM>& left, int first,
                                         const MmaTile<T, N, HEAD_DIM>& right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[n][r] = 0;
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; ++k) {
    uint32_t a[4];
    ldmatrix_x4<false>(a, left.chunk(first + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4<false>(b, right.chunk(16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      mma_m16n8k16<T>(sums[2 * n], a, b[0], b[1]);
      mma_m16n8k16<T>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// sums[16, WIDTH] += weights[16, N] times the right rows' head dimensions from first_dim on
template <class T, int N, int HEAD_DIM, int WIDTH>
__device__ __forceinline__ void add_rows(float (&sums)[WIDTH / 8][4],
                                         const float (&weights)[N / 8][4],
                                         const MmaTile<T, N, HEAD_DIM>& right, int first_dim) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    uint32_t a[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float* pair = &weights[2 * k + r / 2][r % 2 * 2];
      a[r] = pack_pair(pair[0], pair[1], T(0.f));
    }
#pragma unroll
    for (int d = 0; d < WIDTH / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4<true>(b, right.chunk(16 * k + lane % 16, first_dim / 8 + 2 * d + lane / 16));
      mma_m16n8k16<T>(sums[2 * d], a, b[0], b[1]);
      mma_m16n8k16<T>(sums[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Calls body(n, r, half, column) for every scores[n][r] of the lane, of a tile of N columns: it
// stands in row g + 8 * half.
template <int N, class Body>
__device__ __forceinline__ void for_each_score(Body&& body) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n)
#pragma unroll
    for (int r = 0; r < 4; ++r) body(n, r, r / 2, 8 * n + 2 * int(threadIdx.x % 4) + r % 2);
}

// Writes what the lane holds of one row (half 0: row g, 1: row g + 8), times `factor`, to the head
// dimensions from first_dim on.
template <class T, int WIDTH>
__device__ __forceinline__ void store_row(T* to, const float (&sums)[WIDTH / 8][4], int half,
                                          float factor, int first_dim, int head_dim) {
#pragma unroll
  for (int n = 0; n < WIDTH / 8; ++n) {
    const int d = first_dim + 8 * n + 2 * int(threadIdx.x % 4);
    const float low = sums[n][2 * half] * factor, high = sums[n][2 * half + 1] * factor;
    if (head_dim % 2 == 0) {
      if (d < head_dim) *reinterpret_cast<uint32_t*>(to + d) = pack_pair(low, high, T(0.f));
    } else {
      if (d < head_dim) to[d] = from_acc<T>(low);
      if (d + 1 < head_dim) to[d + 1] = from_acc<T>(high);
    }
  }
}

// Sum or maximum over the four lanes that hold one row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

}  // namespace mor
