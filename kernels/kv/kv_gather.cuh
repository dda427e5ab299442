// Packs rows of a paged cache: the contract is in csrc/ops/kv_gather.h.
#pragma once

#include <cub/block/block_scan.cuh>

#include "../rows/row_sums.cuh"

namespace mor {

// A cache and the rows packed from it; strides in bytes.
struct KvGatherSide {
  const char* cache;
  char* out;
  int64_t block_stride, offset_stride, head_stride;
};

struct KvGatherArgs {
  KvGatherSide sides[2];  // k, v
  const int32_t *block_table, *seq_lens;
  int32_t* cu_seqlens;  // [B + 1]
  int64_t num_entries, max_blocks, block_size, num_rows;
  int64_t num_heads, head_bytes;
};

constexpr int kGatherScanThreads = 1024;
using KvGatherScan = cub::BlockScan<int64_t, kGatherScanThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct KvGatherShared {
  typename KvGatherScan::TempStorage scan;
};

// A single block: cu_seqlens becomes the sum of the lengths up to each entry, none past num_rows.
static __global__ void __launch_bounds__(kGatherScanThreads)
    kv_gather_lengths_kernel(KvGatherArgs args) {
  MOR_DYN_SMEM(raw);
  KvGatherShared& shared = *reinterpret_cast<KvGatherShared*>(raw);
  const int64_t room = args.max_blocks * args.block_size;
  int64_t start = 0;
  if (threadIdx.x == 0) args.cu_seqlens[0] = 0;
  for (int64_t first = 0; first < args.num_entries; first += kGatherScanThreads) {
    const int64_t b = first + threadIdx.x;
    int64_t length = b < args.num_entries ? int64_t(args.seq_lens[b]) : 0;
    length = min(max(length, int64_t{0}), room);
    int64_t up_to, total;
    KvGatherScan(shared.scan).InclusiveSum(length, up_to, total);
    if (b < args.num_entries) {
      args.cu_seqlens[b + 1] = int32_t(min(start + up_to, args.num_rows));
    }
    start += total;
    __syncthreads();
  }
}

// A warp owns a packed row of both caches at a time, a lane every 32nd chunk of it.
template <class Chunk>
__global__ void __launch_bounds__(kRowThreads) kv_gather_kernel(KvGatherArgs args) {
  const unsigned chunks = unsigned(args.head_bytes / int64_t(sizeof(Chunk)));
  const unsigned row_chunks = unsigned(args.num_heads) * chunks;
  for (int64_t row = row_item(); row < args.num_rows; row += row_item_step()) {
    int64_t low = 0, high = args.num_entries;  // the first entry that ends after the row
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (args.cu_seqlens[middle + 1] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool found = low < args.num_entries;
    const int64_t i = found ? row - args.cu_seqlens[low] : 0;
    const int64_t block =
        found ? int64_t(args.block_table[low * args.max_blocks + i / args.block_size]) : 0;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const KvGatherSide& side = args.sides[s];
      const char* from =
          side.cache + block * side.block_stride + i % args.block_size * side.offset_stride;
      Chunk* to = reinterpret_cast<Chunk*>(side.out) + row * row_chunks;
      for (unsigned c = threadIdx.x % 32; c < row_chunks; c += 32) {
        const int64_t head = c / chunks, at = c % chunks * int64_t(sizeof(Chunk));
        to[c] =
            found ? *reinterpret_cast<const Chunk*>(from + head * side.head_stride + at) : Chunk{};
      }
    }
  }
}

inline cudaError_t launch_kv_gather(const KvGatherArgs& args, cudaStream_t stream) {
  MOR_LAUNCH(kv_gather_lengths_kernel, 1, kGatherScanThreads, sizeof(KvGatherShared), stream, args);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || args.num_rows == 0 || args.num_heads * args.head_bytes == 0)
    return error;
  uintptr_t bits = uintptr_t(args.head_bytes);
  for (const KvGatherSide& side : args.sides) {
    bits |= reinterpret_cast<uintptr_t>(side.cache) | reinterpret_cast<uintptr_t>(side.out) |
            uintptr_t(side.block_stride | side.offset_stride | side.head_stride);
  }
  const auto launch = [&](auto chunk) {
    const auto kernel = kv_gather_kernel<decltype(chunk)>;
    MOR_LAUNCH(kernel, row_grid(args.num_rows), kRowThreads, 0, stream, args);
  };
  if (bits % 16 == 0) {
    launch(uint4{});
  } else if (bits % 4 == 0) {
    launch(uint32_t{});
  } else {
    launch(uint16_t{});
  }
  return cudaGetLastError();
}

}  // namespace mor
