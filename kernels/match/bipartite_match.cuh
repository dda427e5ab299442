// For every row of a its most similar row of b: the contract is in csrc/ops/bipartite_match.h.
// A block owns 64 packed rows of a and walks over the rows of b that any of them may see; tiles of
// 64 x 64 similarities live in registers only, each thread keeps the best of its columns, and at
// the end 16 threads share theirs. No atomics on results: deterministic.
#pragma once

#include "../rows/rows.cuh"

namespace mor {

constexpr int kMatchThreads = 256;
constexpr int kMatchTile = 64;   // rows of a, and of b
constexpr int kMatchDepth = 32;  // elements of a row at a time
constexpr int kMatchPart = 4;    // rows of each a thread owns: every 16th

// Strides in elements; norms null for the inner product.
template <class T>
struct BipartiteMatchArgs {
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t b_stride;
  const int32_t* cu_seqlens_a;
  const int32_t* cu_seqlens_b;
  acc_t<T>* a_norms;  // [Na] scratch: 1 / |a_i|
  acc_t<T>* b_norms;  // [Nb]
  acc_t<T>* scores;   // [Na]
  int64_t* index;     // [Na]
  int64_t num_a, num_b, width, num_sequences;
};

// Rows in the accumulation type; the padding spreads them over the banks.
template <class Acc>
struct __align__(16) MatchShared {
  static constexpr int kStride = kMatchDepth + 16 / int(sizeof(Acc));
  Acc a[kMatchTile][kStride], b[kMatchTile][kStride];
  int begin[kMatchTile], end[kMatchTile];  // rows of b that each row of a sees
  int first, last;                         // that any of them sees
};

// A warp owns a row at a time: norms[row] = 1 / |x_row|, 0 for a row of zeros. A lane adds the same
// elements in the same order whatever kPack, so that strides do not change the result.
template <class T, int kPack>
__global__ void __launch_bounds__(kRowThreads)
    bipartite_match_norms_kernel(const T* x, int64_t stride, int64_t num_rows, int64_t width,
                                 acc_t<T>* norms) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = row_item(); row < num_rows; row += row_item_step()) {
    acc_t<T> sum = 0;
    constexpr int kChunk = 16 / int(sizeof(T));
    for (int64_t begin = lane * kChunk; begin < width; begin += 32 * kChunk) {
#pragma unroll
      for (int e = 0; e < kChunk; e += kPack) {
        if (begin + e >= width) break;
        const auto part = *reinterpret_cast<const Pack<T, kPack>*>(x + row * stride + begin + e);
#pragma unroll
        for (int k = 0; k < kPack; ++k) sum += to_acc(part.v[k]) * to_acc(part.v[k]);
      }
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane == 0) norms[row] = sum > 0 ? 1 / sqrt(sum) : sum;  // NaN stays NaN
  }
}

// Elements [d, d + kMatchDepth) of 64 rows from `first` on; zeros beyond the last row and column.
template <int kPack, class T>
__device__ __forceinline__ void load_match_rows(
    acc_t<T> (&tile)[kMatchTile][MatchShared<acc_t<T>>::kStride], const T* rows, int64_t stride,
    int64_t first, int64_t num_rows, int64_t d, int64_t width) {
  constexpr int kPerRow = kMatchDepth / kPack;
  for (int c = threadIdx.x; c < kMatchTile * kPerRow; c += kMatchThreads) {
    const int r = c / kPerRow, e = c % kPerRow * kPack;
    Pack<T, kPack> part{};
    if (first + r < num_rows && d + e < width)
      part = *reinterpret_cast<const Pack<T, kPack>*>(rows + (first + r) * stride + d + e);
#pragma unroll
    for (int k = 0; k < kPack; ++k) tile[r][e + k] = to_acc(part.v[k]);
  }
}

// Four neighbours of a shared row.
template <class Acc>
__device__ __forceinline__ void load_match_part(Acc (&to)[4], const Acc* from) {
  constexpr int kPack = 16 / int(sizeof(Acc));
#pragma unroll
  for (int e = 0; e < 4; e += kPack) {
    const auto part = *reinterpret_cast<const Pack<Acc, kPack>*>(from + e);
#pragma unroll
    for (int k = 0; k < kPack; ++k) to[e + k] = part.v[k];
  }
}

// Threads 0 .. 63: which rows of b the block's rows of a see.
template <class T>
__device__ __forceinline__ void find_match_ranges(MatchShared<acc_t<T>>& s,
                                                  const BipartiteMatchArgs<T>& p, int64_t first) {
  if (threadIdx.x == 0) {
    s.first = INT32_MAX;
    s.last = 0;
  }
  __syncthreads();
  if (threadIdx.x < kMatchTile) {
    const int64_t row = first + threadIdx.x;
    int64_t low = 0, high = p.num_sequences;  // the first sequence that ends after the row
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (p.cu_seqlens_a[middle + 1] > row) high = middle;
      else low = middle + 1;
    }
    int begin = 0, end = 0;
    if (low < p.num_sequences && row < p.num_a && p.cu_seqlens_a[low] <= row) {
      begin = max(p.cu_seqlens_b[low], 0);
      end = min(p.cu_seqlens_b[low + 1], int(p.num_b));
    }
    s.begin[threadIdx.x] = begin;
    s.end[threadIdx.x] = end;
    if (begin < end) {
      atomicMin(&s.first, begin);
      atomicMax(&s.last, end);
    }
  }
  __syncthreads();
}

// One block, one tile of rows of a at a time. Thread (down, across) owns rows down + 16 i and
// columns across + 16 j of a tile.
template <class T, int kPack>
__global__ void __launch_bounds__(kMatchThreads) bipartite_match_kernel(BipartiteMatchArgs<T> p) {
  using Acc = acc_t<T>;
  MOR_DYN_SMEM(raw);
  MatchShared<Acc>& s = *reinterpret_cast<MatchShared<Acc>*>(raw);
  const int down = threadIdx.x / 16, across = threadIdx.x % 16;
  for (int64_t first = int64_t{blockIdx.x} * kMatchTile; first < p.num_a;
       first += int64_t{gridDim.x} * kMatchTile) {
    find_match_ranges(s, p, first);
    Acc best[kMatchPart];
    int index[kMatchPart];
#pragma unroll
    for (int i = 0; i < kMatchPart; ++i) {
      best[i] = Acc(-INFINITY);
      index[i] = -1;
    }
    for (int64_t tile = s.first; tile < s.last; tile += kMatchTile) {
      Acc sums[kMatchPart][kMatchPart] = {};
      for (int64_t d = 0; d < p.width; d += kMatchDepth) {
        load_match_rows<kPack>(s.a, p.a, p.a_stride, first, p.num_a, d, p.width);
        load_match_rows<kPack>(s.b, p.b, p.b_stride, tile, p.num_b, d, p.width);
        __syncthreads();
#pragma unroll 2
        for (int e = 0; e < kMatchDepth; e += 4) {
          Acc left[kMatchPart][4];
#pragma unroll
          for (int i = 0; i < kMatchPart; ++i) load_match_part(left[i], &s.a[down + 16 * i][e]);
#pragma unroll
          for (int j = 0; j < kMatchPart; ++j) {
            Acc right[4];
            load_match_part(right, &s.b[across + 16 * j][e]);
#pragma unroll
            for (int i = 0; i < kMatchPart; ++i)
#pragma unroll
              for (int k = 0; k < 4; ++k) sums[i][j] += left[i][k] * right[k];
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int j = 0; j < kMatchPart; ++j) {
        const int column = int(tile) + across + 16 * j;
        const Acc norm = p.b_norms != nullptr && column < p.num_b ? p.b_norms[column] : Acc(1);
#pragma unroll
        for (int i = 0; i < kMatchPart; ++i) {
          const int r = down + 16 * i;
          const Acc similarity = sums[i][j] * norm;
          if (column >= s.begin[r] && column < s.end[r] && similarity > best[i]) {
            best[i] = similarity;
            index[i] = column;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMatchPart; ++i) {
#pragma unroll
      for (int lanes = 1; lanes < 16; lanes *= 2) {
        const Acc other = __shfl_xor_sync(~0u, best[i], lanes);
        const int other_index = __shfl_xor_sync(~0u, index[i], lanes);
        if (other > best[i] || (other == best[i] && other_index < index[i])) {
          best[i] = other;
          index[i] = other_index;
        }
      }
      const int64_t row = first + down + 16 * i;
      if (across == 0 && row < p.num_a) {
        const bool scaled = p.a_norms != nullptr && index[i] >= 0;
        p.scores[row] = scaled ? best[i] * p.a_norms[row] : best[i];
        p.index[row] = index[i];
      }
    }
    __syncthreads();  // the ranges are done with
  }
}

template <class T>
cudaError_t launch_bipartite_match(const BipartiteMatchArgs<T>& p, cudaStream_t stream) {
  if (p.num_a == 0) return cudaSuccess;
  constexpr int kPack = 16 / sizeof(T);
  const bool packed = packs<T>(row_bits(p.a, p.a_stride) | row_bits(p.b, p.b_stride), p.width);
  if (p.a_norms != nullptr) {
    const auto norms =
        packed ? bipartite_match_norms_kernel<T, kPack> : bipartite_match_norms_kernel<T, 1>;
    MOR_LAUNCH(norms, row_grid(p.num_a), kRowThreads, 0, stream, p.a, p.a_stride, p.num_a, p.width,
               p.a_norms);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    if (p.num_b > 0) {
      MOR_LAUNCH(norms, row_grid(p.num_b), kRowThreads, 0, stream, p.b, p.b_stride, p.num_b,
                 p.width, p.b_norms);
      if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    }
  }
  const auto kernel = packed ? bipartite_match_kernel<T, kPack> : bipartite_match_kernel<T, 1>;
  MOR_LAUNCH(kernel, grid_for(p.num_a, kMatchTile), kMatchThreads, sizeof(MatchShared<acc_t<T>>),
             stream, p);
  return cudaGetLastError();
}

}  // namespace mor
