// Stable counting sort of rows by key: the contract is in csrc/ops/group_rows.h. Chunks of 256 rows
// are counted, the counts scanned key after key, and each row written at the start of its (key,
// chunk) plus its rank among the equal keys of the chunk. No atomics: deterministic.
#pragma once

#include <cub/block/block_scan.cuh>

#include "../common.cuh"

namespace mor {

constexpr int kGroupChunk = 256;
constexpr int kGroupScanThreads = 1024;

struct GroupRowsArgs {
  const int32_t* cu_seqlens;  // [B + 1], or null: one sequence of all rows
  int64_t* counts;            // [num_keys * num_chunks + 1] scratch, zero
  int64_t* rows;              // [N]
  int64_t* offsets;           // [num_keys * B + 1]
  int64_t num_rows, num_keys, num_sequences, num_chunks;
};

struct GroupRowsShared {
  int64_t keys[kGroupChunk];
};

template <class Key>
__device__ __forceinline__ int64_t group_key(const Key* keys, int64_t row, int64_t num_keys) {
  return min(max(static_cast<int64_t>(keys[row]), int64_t{0}), num_keys - 1);
}

// A block loads a chunk, a thread its row; returns how many equal keys lie before it in the chunk
// and, in `last`, that none follows.
template <class Key>
__device__ __forceinline__ int group_rank(GroupRowsShared& shared, const Key* keys,
                                          const GroupRowsArgs& args, int64_t chunk, bool& last) {
  const int64_t row = chunk * kGroupChunk + threadIdx.x;
  const int64_t key = row < args.num_rows ? group_key(keys, row, args.num_keys) : -1;
  __syncthreads();  // the chunk before is done with
  shared.keys[threadIdx.x] = key;
  __syncthreads();
  int rank = 0;
  last = true;
  for (int j = 0; j < kGroupChunk; ++j) {
    const bool equal = shared.keys[j] == key;
    rank += equal && j < int(threadIdx.x);
    last = last && !(equal && j > int(threadIdx.x));
  }
  return rank;
}

// One block, one chunk at a time: counts[key, chunk].
template <class Key>
__global__ void __launch_bounds__(kGroupChunk)
    group_rows_count_kernel(const Key* keys, GroupRowsArgs args) {
  MOR_DYN_SMEM(raw);
  GroupRowsShared& shared = *reinterpret_cast<GroupRowsShared*>(raw);
  for (int64_t chunk = blockIdx.x; chunk < args.num_chunks; chunk += gridDim.x) {
    bool last;
    const int rank = group_rank(shared, keys, args, chunk, last);
    if (last && chunk * kGroupChunk + threadIdx.x < args.num_rows)
      args.counts[shared.keys[threadIdx.x] * args.num_chunks + chunk] = rank + 1;
  }
}

// By warps: raking would hold 32 counts of 8 bytes in the registers of a thread, and spill.
using GroupScan = cub::BlockScan<int64_t, kGroupScanThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct GroupScanShared {
  typename GroupScan::TempStorage scan;
};

// A single block: counts becomes its exclusive sum, [num_keys, num_chunks] row after row.
static __global__ void __launch_bounds__(kGroupScanThreads)
    group_rows_scan_kernel(int64_t* counts, int64_t size) {
  MOR_DYN_SMEM(raw);
  GroupScanShared& shared = *reinterpret_cast<GroupScanShared*>(raw);
  int64_t start = 0;
  for (int64_t first = 0; first < size; first += kGroupScanThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t before, total;
    GroupScan(shared.scan).ExclusiveSum(i < size ? counts[i] : 0, before, total);
    if (i < size) counts[i] = start + before;
    start += total;
    __syncthreads();
  }
}

// One block, one chunk at a time: its rows; then a thread owns some of the offsets.
template <class Key>
__global__ void __launch_bounds__(kGroupChunk)
    group_rows_write_kernel(const Key* keys, GroupRowsArgs args) {
  MOR_DYN_SMEM(raw);
  GroupRowsShared& shared = *reinterpret_cast<GroupRowsShared*>(raw);
  for (int64_t chunk = blockIdx.x; chunk < args.num_chunks; chunk += gridDim.x) {
    bool last;
    const int rank = group_rank(shared, keys, args, chunk, last);
    const int64_t row = chunk * kGroupChunk + threadIdx.x;
    if (row < args.num_rows)
      args.rows[args.counts[shared.keys[threadIdx.x] * args.num_chunks + chunk] + rank] = row;
  }
  const int64_t num_runs = args.num_keys * args.num_sequences;
  for (int64_t run = int64_t{blockIdx.x} * kGroupChunk + threadIdx.x; run <= num_runs;
       run += int64_t{gridDim.x} * kGroupChunk) {
    if (run == num_runs) {
      args.offsets[run] = args.num_rows;
      continue;
    }
    const int64_t key = run / args.num_sequences, b = run % args.num_sequences;
    const int64_t begin = args.cu_seqlens == nullptr ? 0 : int64_t{args.cu_seqlens[b]};
    const int64_t sequence = min(max(begin, int64_t{0}), args.num_rows);
    const int64_t chunk = sequence / kGroupChunk;
    // chunk = num_chunks is the start of the next key: no row of this one is left.
    int64_t start = args.counts[key * args.num_chunks + chunk];
    for (int64_t row = chunk * kGroupChunk; row < sequence; ++row)
      start += group_key(keys, row, args.num_keys) == key;
    args.offsets[run] = start;
  }
}

template <class Key>
cudaError_t launch_group_rows(const Key* keys, const GroupRowsArgs& args, cudaStream_t stream) {
  const unsigned grid = grid_for(args.num_chunks, 1);
  if (args.num_chunks > 0) {
    auto count = group_rows_count_kernel<Key>;
    MOR_LAUNCH(count, grid, kGroupChunk, sizeof(GroupRowsShared), stream, keys, args);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  MOR_LAUNCH(group_rows_scan_kernel, 1, kGroupScanThreads, sizeof(GroupScanShared), stream,
             args.counts, args.num_keys * args.num_chunks + 1);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  auto write = group_rows_write_kernel<Key>;
  MOR_LAUNCH(write, grid, kGroupChunk, sizeof(GroupRowsShared), stream, keys, args);
  return cudaGetLastError();
}

}  // namespace mor
