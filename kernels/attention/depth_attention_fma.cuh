// Products of tiles in shared memory without tensor cores. 128 threads stand 16 down (`down`) by 8
// across (`across`); a thread owns rows down + 16 * i of the left tile, columns across + 8 * j of
// the right one, and the four neighbouring head dimensions at 4 * across + 32 * c for each c.
#pragma once

#include "depth_attention_masks.cuh"

namespace mor {

// Rows of head_dim numbers in the accumulation type; the padding spreads rows over the banks.
template <class Acc, int ROWS, int HEAD_DIM>
struct __align__(16) RowTile {
  static constexpr int kStride = HEAD_DIM + 16 / int(sizeof(Acc));
  Acc data[ROWS][kStride];
};

template <class Acc>
struct Four {
  Acc x[4];
};

template <class Acc>
__device__ __forceinline__ Four<Acc> load_four(const Acc* p) {
  if constexpr (sizeof(Acc) == 4) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    return {v.x, v.y, v.z, v.w};
  } else {
    const double2 a = reinterpret_cast<const double2*>(p)[0];
    const double2 b = reinterpret_cast<const double2*>(p)[1];
    return {a.x, a.y, b.x, b.y};
  }
}

// Fills a tile from global rows; row(r) is null for rows that do not exist, which become zeros, as
// does what pads head_dim.
template <class T, int ROWS, int HEAD_DIM, class Row>
__device__ __forceinline__ void load_rows(RowTile<T, ROWS, HEAD_DIM>& tile,
                                          const DepthAttention<T>& p, Row&& row) {
  constexpr int kChunk = 16 / int(sizeof(T)), kPerRow = HEAD_DIM / kChunk;
  for (int c = threadIdx.x; c < ROWS * kPerRow; c += blockDim.x) {
    const int r = c / kPerRow, d = c % kPerRow * kChunk;
    const T* from = row(r);
    T* to = &tile.data[r][d];
    if (p.aligned && from != nullptr && d < p.head_dim) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + d);
    } else {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        to[e] = from != nullptr && d + e < p.head_dim ? from[d + e] : T(0);
      }
    }
  }
}

// sums[i][j] = <left row down + 16 i, right row across + 8 j>
template <class Acc, int M, int N, int HEAD_DIM>
__device__ __forceinline__ void dot_rows(Acc (&sums)[M / 16][N / 8],
                                         const RowTile<Acc, M, HEAD_DIM>& left,
                                         const RowTile<Acc, N, HEAD_DIM>& right) {
  const int down = threadIdx.x / 8, across = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < M / 16; ++i)
#pragma unroll
    for (int j = 0; j < N / 8; ++j) sums[i][j] = 0;
#pragma unroll 2
  for (int d = 0; d < HEAD_DIM; d += 4) {
    Four<Acc> a[M / 16];
#pragma unroll
    for (int i = 0; i < M / 16; ++i) a[i] = load_four(&left.data[down + 16 * i][d]);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const Four<Acc> b = load_four(&right.data[across + 8 * j][d]);
#pragma unroll
      for (int i = 0; i < M / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j] += a[i].x[e] * b.x[e];
    }
  }
}

// sums[i][..] += weight(i, n) * right row n, for the thread's head dimensions
template <class Acc, int M, int N, int HEAD_DIM, class Weight>
__device__ __forceinline__ void add_rows(Acc (&sums)[M][HEAD_DIM / 8],
                                         const RowTile<Acc, N, HEAD_DIM>& right, Weight&& weight) {
  const int across = threadIdx.x % 8;
#pragma unroll 2
  for (int n = 0; n < N; ++n) {
    Acc w[M];
#pragma unroll
    for (int i = 0; i < M; ++i) w[i] = weight(i, n);
#pragma unroll
    for (int c = 0; c < HEAD_DIM / 32; ++c) {
      const Four<Acc> row = load_four(&right.data[n][4 * across + 32 * c]);
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][4 * c + e] += w[i] * row.x[e];
    }
  }
}

// Writes a thread's part of one row, times `factor`.
template <class T, int HEAD_DIM>
__device__ __forceinline__ void store_row(T* to, const T (&sums)[HEAD_DIM / 8], T factor,
                                          int head_dim) {
#pragma unroll
  for (int c = 0; c < HEAD_DIM / 32; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int d = 4 * int(threadIdx.x % 8) + 32 * c + e;
      if (d < head_dim) to[d] = sums[4 * c + e] * factor;
    }
}

}  // namespace mor
