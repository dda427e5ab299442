// Which tiles of keys and query rows depth_attention's kernels visit, and what they mask inside
// one.
#pragma once

#include "depth_attention.cuh"

namespace mor {

// First tile start at or after `begin` that holds a key as deep as `depth`; past `end` if none
// does.
__device__ __forceinline__ unsigned next_key_tile(const int32_t* k_depths, int depth,
                                                  unsigned tile_keys, unsigned begin,
                                                  unsigned end) {
  if (k_depths == nullptr) return begin;
  for (; begin < end; begin += tile_keys) {
    bool deep = false;
    for (unsigned j = begin + threadIdx.x % 32; j < min(begin + tile_keys, end); j += 32) {
      deep |= k_depths[j] >= depth;
    }
    if (__any_sync(~0u, deep)) break;
  }
  return begin;
}

// Row `key` of k or v for a query tile whose rows see keys from first .. end - 1, none of them less
// deep than `least_depth`; null, which loads as zeros, where none can see it: there may lie NaN
// (unused slots of a cache), which a weight of 0 would not keep out of the sums.
template <class T>
__device__ __forceinline__ const T* seen_key_row(const DepthAttention<T>& p,
                                                 const AttentionOperand<T>& from, int kv_head,
                                                 unsigned key, unsigned first, unsigned end,
                                                 int least_depth) {
  if (key < first || key >= end) return nullptr;
  if (p.k_depths != nullptr && p.k_depths[key] < least_depth) return nullptr;
  return from.at(key, kv_head);
}

// Packed rows first .. end - 1 of the sequence are those that a position lets see any of the keys
// key .. key_end - 1, and perhaps rows between them.
struct RowRange {
  unsigned first, end;
};
template <class T>
__device__ __forceinline__ RowRange rows_seeing(const DepthAttention<T>& p,
                                                const QueryTile<T>& sequence, unsigned key,
                                                unsigned key_end) {
  const int32_t begin = int32_t(sequence.q_begin);
  int32_t end = begin + int32_t(sequence.num_rows / sequence.group);
  const int32_t first =
      first_not(begin, end, [&](int32_t query) { return p.key_ranges[query].end() <= key; });
  if (p.window > 0) {
    end = first_not(first, end, [&](int32_t query) { return p.key_ranges[query].begin < key_end; });
  }
  return {unsigned(first - begin) * sequence.group, unsigned(end - begin) * sequence.group};
}

// First tile start at or after rows.first with a row of `rows` that sees one of the keys from row
// `key` on, of which the deepest has `depth`.
template <class T>
__device__ __forceinline__ unsigned next_query_tile(const DepthAttention<T>& p,
                                                    const QueryTile<T>& sequence,
                                                    unsigned tile_rows, unsigned key, int depth,
                                                    RowRange rows) {
  unsigned first = rows.first;
  if (p.q_depths == nullptr) return first;
  for (; first < rows.end; first += tile_rows) {
    bool sees = false;
    for (unsigned r = first + threadIdx.x % 32; r < min(first + tile_rows, rows.end); r += 32) {
      const unsigned query = sequence.q_begin + r / sequence.group;
      sees |= p.key_ranges[query].end() > key && p.q_depths[query] <= depth;
    }
    if (__any_sync(~0u, sees)) break;
  }
  return first;
}

// What the rows of a query tile may see. A row that does not exist sees nothing.
template <int ROWS>
struct QueryMask {
  KeyRange keys[ROWS];
  int32_t depth[ROWS];

  template <class T>
  __device__ __forceinline__ void load(const DepthAttention<T>& p, const QueryTile<T>& tile) {
    for (int r = threadIdx.x; r < ROWS; r += blockDim.x) {
      keys[r] = tile.has(r) ? p.key_ranges[tile.query(r)] : KeyRange{0, 0};
      depth[r] = !tile.has(r)            ? INT32_MAX
                 : p.q_depths == nullptr ? INT32_MIN
                                         : p.q_depths[tile.query(r)];
    }
  }

  __device__ __forceinline__ int least_depth() const {
    int least = INT32_MAX;
    for (int r = threadIdx.x % 32; r < ROWS; r += 32) least = min(least, depth[r]);
    return __reduce_min_sync(~0u, least);
  }
};

// What the backward knows of the rows of a query tile: what they may see, their log-sum-exp times
// `factor`, and <grad_out, out>.
template <class Acc, int ROWS>
struct QueryFacts {
  QueryMask<ROWS> mask;
  Acc lse[ROWS], delta[ROWS];

  template <class T>
  __device__ __forceinline__ void load(const DepthAttention<T>& p, const QueryTile<T>& tile,
                                       Acc factor = Acc(1)) {
    mask.load(p, tile);
    for (int r = threadIdx.x; r < ROWS; r += blockDim.x) {
      const int64_t at = tile.has(r) ? int64_t(tile.head(r)) * p.num_queries + tile.query(r) : 0;
      lse[r] = backward_lse(p.lse[at]) * factor;
      delta[r] = p.delta[at];
    }
  }
};

// Depth and bias of the keys of a tile, the bias times `factor`.
template <class Acc, int KEYS>
struct KeyFacts {
  int32_t depth[KEYS];
  Acc bias[KEYS];

  template <class T>
  __device__ __forceinline__ void load(const DepthAttention<T>& p, unsigned begin, unsigned end,
                                       Acc factor = Acc(1)) {
    for (unsigned j = threadIdx.x; j < KEYS; j += blockDim.x) {
      const bool exists = begin + j < end;
      depth[j] = exists && p.k_depths != nullptr ? p.k_depths[begin + j] : INT32_MIN;
      bias[j] = exists && p.key_bias != nullptr ? p.key_bias[begin + j] * factor : Acc(0);
    }
  }
};

}  // namespace mor
