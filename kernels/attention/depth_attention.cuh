// depth_attention: what its forward and backward kernels share. See csrc/ops/depth_attention.h.
//
// Query rows are packed for grouped-query attention: row r of a sequence is its query r / group of
// head r % group of those that read one key head. So a block of any kernel works for one key head,
// reads each key once for the whole group, and decode fills tiles as well as it can.
// The grid knows no sequence length: it has as many tiles as there could be, and blocks find theirs
// by a scan of cu_seqlens. Row numbers are 32-bit (as cu_seqlens; packed rows too, which the
// launchers check), offsets 64-bit.
#pragma once

#include "../common.cuh"

namespace mor {

template <class T>
struct AttentionOperand {
  const T* data;
  int64_t row_stride, head_stride;  // in elements; the last dimension is contiguous

  __device__ __forceinline__ const T* at(int64_t row, int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

// The keys, as rows of k, that a query's position lets it see.
struct __align__(8) KeyRange {
  uint32_t begin, count;

  __device__ __forceinline__ bool has(uint32_t key) const { return key - begin < count; }
  __device__ __forceinline__ uint32_t end() const { return begin + count; }
};

// Everything the kernels read and write. Optional pointers may be null.
template <class T>
struct DepthAttention {
  AttentionOperand<T> q, k, v;
  const int64_t *q_positions, *k_positions;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  const int32_t *q_depths, *k_depths;  // optional
  const acc_t<T>* key_bias;            // optional
  int64_t num_queries, num_keys;
  int num_sequences, num_heads, num_kv_heads, head_dim;
  bool causal;
  acc_t<T> scale;
  int64_t window;        // positions that a query sees, its own included; 0: all before it
  KeyRange* key_ranges;  // [Nq] scratch; inside a sequence neither begins nor ends descend

  T* out;         // [Nq, H, hd]
  acc_t<T>* lse;  // [H, Nq]

  // Backward only.
  AttentionOperand<T> grad_out, forward_out;
  acc_t<T>* delta;  // [H, Nq] scratch: <grad_out, out> of each row
  T *grad_q, *grad_k, *grad_v;
  acc_t<T>* grad_bias_parts;  // [Hkv, Nk] scratch, with key_bias
  acc_t<T>* grad_key_bias;    // [Nk], with key_bias

  bool aligned;  // every row of every operand is a whole number of aligned 16-byte chunks

  __host__ __device__ int group() const { return num_heads / num_kv_heads; }
};

// The first of rows begin .. end - 1, of which later ones satisfy `passed` no more, that does not.
template <class Passed>
__device__ __forceinline__ int32_t first_not(int32_t begin, int32_t end, Passed&& passed) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (passed(middle)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return end;
}

// One thread per query: searches its sequence, then its keys in ascending positions.
template <class T>
__global__ void depth_attention_key_ranges_kernel(DepthAttention<T> p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < p.num_queries; i += step) {
    int low = 0, high = p.num_sequences - 1;  // the last sequence that begins at or before i
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (p.cu_seqlens_q[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    int32_t begin = p.cu_seqlens_k[low], end = p.cu_seqlens_k[low + 1];
    const int64_t position = p.q_positions[i];
    if (p.causal) {
      end = first_not(begin, end, [&](int32_t j) { return p.k_positions[j] <= position; });
    }
    if (p.window > 0) {  // unsigned differences to keys not after the query cannot overflow
      begin = first_not(begin, end, [&](int32_t j) {
        return uint64_t(position) - uint64_t(p.k_positions[j]) >= uint64_t(p.window);
      });
    }
    p.key_ranges[i] = {uint32_t(begin), uint32_t(end - begin)};
  }
}

struct SequenceTile {
  int sequence;    // -1: there are fewer tiles
  unsigned first;  // row in the sequence
};

// Tile number `tile` of sequences that have `per_row` rows for each row of cu_seqlens, cut into
// `tile_rows`. Every warp finds it alone, 32 sequences a step.
__device__ __forceinline__ SequenceTile find_tile(const int32_t* cu_seqlens, int num_sequences,
                                                  int per_row, unsigned tile_rows, unsigned tile) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < num_sequences; base += 32) {
    const int b = base + lane;
    unsigned tiles = 0;
    if (b < num_sequences) {
      const unsigned rows = unsigned(cu_seqlens[b + 1] - cu_seqlens[b]) * unsigned(per_row);
      tiles = (rows + tile_rows - 1) / tile_rows;
    }
    unsigned up_to = tiles;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned below = __shfl_up_sync(~0u, up_to, distance);
      if (lane >= distance) up_to += below;
    }
    const unsigned reached = __ballot_sync(~0u, up_to > tile);
    if (reached != 0) {
      const int owner = __ffs(int(reached)) - 1;
      return {base + owner, (tile - __shfl_sync(~0u, up_to - tiles, owner)) * tile_rows};
    }
    tile -= __shfl_sync(~0u, up_to, 31);
  }
  return {-1, 0};
}

inline int64_t most_tiles(int64_t rows, int num_sequences, int tile_rows) {
  return rows / tile_rows + num_sequences;
}

// A tile of packed query rows of a sequence.
template <class T>
struct QueryTile {
  unsigned q_begin, num_rows;  // of the sequence; num_rows are packed
  unsigned group, kv_head;
  unsigned first;  // packed row where the tile begins: query first_query, head first_head of group
  unsigned first_query, first_head;

  __device__ __forceinline__ QueryTile(const DepthAttention<T>& p, int sequence, unsigned kv_head)
      : q_begin(unsigned(p.cu_seqlens_q[sequence])),
        num_rows((unsigned(p.cu_seqlens_q[sequence + 1]) - q_begin) * unsigned(p.group())),
        group(unsigned(p.group())),
        kv_head(kv_head) {
    move_to(0);
  }

  __device__ __forceinline__ void move_to(unsigned row) {
    first = row;
    first_query = q_begin + row / group;
    first_head = row % group;
  }

  __device__ __forceinline__ bool has(unsigned r) const { return first + r < num_rows; }
  __device__ __forceinline__ unsigned query(unsigned r) const {
    return first_query + (first_head + r) / group;
  }
  __device__ __forceinline__ unsigned head(unsigned r) const {
    return kv_head * group + (first_head + r) % group;
  }
  // Of row r in `from`; null if there is no such row.
  __device__ __forceinline__ const T* row(const AttentionOperand<T>& from, unsigned r) const {
    return has(r) ? from.at(query(r), head(r)) : nullptr;
  }
};

// exp2f spends three instructions more on every score, for results below 2^-126.
__device__ __forceinline__ float exp2_acc(float x) {
#if defined(MOR_SIMT)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double exp2_acc(double x) { return exp2(x); }
__device__ __forceinline__ float log_acc(float x) { return logf(x); }
__device__ __forceinline__ double log_acc(double x) { return log(x); }

// softmax_lse as the backward subtracts it: a row that sees nothing, or only keys whose bias is
// -inf, has weights of 0 instead of NaN.
template <class Acc>
__device__ __forceinline__ Acc backward_lse(Acc lse) {
  return lse == Acc(-INFINITY) ? Acc(INFINITY) : lse;
}

template <class Acc>
inline constexpr Acc kLog2E = Acc(1.4426950408889634074);
template <class Acc>
inline constexpr Acc kLn2 = Acc(0.69314718055994530942);

template <class T>
cudaError_t launch_depth_attention_key_ranges(const DepthAttention<T>& p, cudaStream_t stream) {
  MOR_LAUNCH(depth_attention_key_ranges_kernel<T>, grid_for(p.num_queries, 128), 128, 0, stream, p);
  return cudaGetLastError();
}

// Kernels are compiled for few head sizes; others are padded with zeros in shared memory.
template <class Body>
cudaError_t dispatch_head_dim(int head_dim, Body&& body) {
  if (head_dim <= 64) return body.template operator()<64>();
  if (head_dim <= 128) return body.template operator()<128>();
  return body.template operator()<256>();
}

// Whether the kernels' row numbers can hold the problem.
template <class T>
bool fits_row_numbers(const DepthAttention<T>& p) {
  return p.num_queries * p.group() <= INT32_MAX && p.num_keys <= INT32_MAX;
}

// One block for each tile and key head.
template <class T>
cudaError_t launch_attention(void (*kernel)(DepthAttention<T>), int64_t tiles, int threads,
                             size_t shared_bytes, const DepthAttention<T>& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error != cudaSuccess) return error;
  MOR_LAUNCH(kernel, dim3(unsigned(tiles), unsigned(p.num_kv_heads)), threads, shared_bytes, stream,
             p);
  return cudaGetLastError();
}

}  // namespace mor
