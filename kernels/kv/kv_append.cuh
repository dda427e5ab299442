// Writes the rows of new tokens into their slots of a paged cache: the contract is in
// csrc/ops/kv_append.h. Of several tokens with one slot only the last writes: every block looks for
// the slots of its tokens among all later ones, which costs N * N / tokens_per_block reads from
// cache, much less than the copy until N is some 10^5.
#pragma once

#include "../common.cuh"

namespace mor {

constexpr int kAppendThreads = 256;  // eight warps, each copies a token at a time
constexpr int kAppendTokens = 32;    // at most, of a block

// One cache and what goes into it; strides in bytes.
struct KvAppendSide {
  char* cache;
  const char* rows;
  int64_t block_stride, offset_stride, cache_head_stride, row_stride, head_stride;
};

struct KvAppendArgs {
  KvAppendSide sides[2];  // k, v
  const int64_t* slots;
  int64_t num_tokens, num_slots, block_size;
  int64_t num_heads, head_bytes;
  int tokens_per_block;
  int64_t num_groups;  // of tokens_per_block tokens
};

struct KvAppendShared {
  int64_t slots[kAppendTokens];  // below 0: the token writes nothing
  int64_t blocks[kAppendTokens], offsets[kAppendTokens];
  unsigned hidden;  // a bit for each token that writes nothing
};

// A block owns tokens_per_block tokens, a warp every eighth of them, a lane every 32nd chunk.
template <class Chunk>
__global__ void __launch_bounds__(kAppendThreads) kv_append_kernel(KvAppendArgs args) {
  MOR_DYN_SMEM(raw);
  KvAppendShared& shared = *reinterpret_cast<KvAppendShared*>(raw);
  // Of 32 bits: the division of 64-bit numbers is a call, around which registers spill.
  const unsigned chunks = unsigned(args.head_bytes / int64_t(sizeof(Chunk)));
  const unsigned row_chunks = unsigned(args.num_heads) * chunks;
  for (int64_t group = blockIdx.x; group < args.num_groups; group += gridDim.x) {
    const int64_t first = group * args.tokens_per_block;
    const int count = int(min(int64_t(args.tokens_per_block), args.num_tokens - first));
    __syncthreads();  // the group before is done with
    if (threadIdx.x == 0) shared.hidden = 0;
    if (int(threadIdx.x) < count) {
      const int64_t slot = args.slots[first + threadIdx.x];
      shared.slots[threadIdx.x] = slot < args.num_slots ? slot : -1;
      shared.blocks[threadIdx.x] = slot / args.block_size;
      shared.offsets[threadIdx.x] = slot % args.block_size;
    }
    __syncthreads();
    for (int64_t j = first + 1 + threadIdx.x; j < args.num_tokens; j += kAppendThreads) {
      const int64_t slot = args.slots[j];
      for (int t = 0; t < count; ++t) {
        if (shared.slots[t] == slot && j > first + t) atomicOr(&shared.hidden, 1u << t);
      }
    }
    __syncthreads();
    for (int t = int(threadIdx.x) / 32; t < count; t += kAppendThreads / 32) {
      if (shared.slots[t] < 0 || (shared.hidden >> t & 1) != 0) continue;
#pragma unroll 1
      for (int s = 0; s < 2; ++s) {
        const KvAppendSide& side = args.sides[s];
        char* to = side.cache + shared.blocks[t] * side.block_stride +
                   shared.offsets[t] * side.offset_stride;
        const char* from = side.rows + (first + t) * side.row_stride;
        for (unsigned c = threadIdx.x % 32; c < row_chunks; c += 32) {
          const int64_t head = c / chunks, at = c % chunks * int64_t(sizeof(Chunk));
          *reinterpret_cast<Chunk*>(to + head * side.cache_head_stride + at) =
              *reinterpret_cast<const Chunk*>(from + head * side.head_stride + at);
        }
      }
    }
  }
}

inline uintptr_t address_bits(const KvAppendSide& side) {
  return reinterpret_cast<uintptr_t>(side.cache) | reinterpret_cast<uintptr_t>(side.rows) |
         uintptr_t(side.block_stride | side.offset_stride | side.cache_head_stride |
                   side.row_stride | side.head_stride);
}

inline cudaError_t launch_kv_append(KvAppendArgs args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.num_heads == 0 || args.head_bytes == 0) return cudaSuccess;
  args.tokens_per_block = args.num_tokens <= 1024 ? 8 : kAppendTokens;
  args.num_groups = (args.num_tokens + args.tokens_per_block - 1) / args.tokens_per_block;
  const uintptr_t bits =
      address_bits(args.sides[0]) | address_bits(args.sides[1]) | uintptr_t(args.head_bytes);
  const auto launch = [&](auto chunk) {
    const auto kernel = kv_append_kernel<decltype(chunk)>;
    MOR_LAUNCH(kernel, grid_for(args.num_tokens, args.tokens_per_block), kAppendThreads,
               sizeof(KvAppendShared), stream, args);
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
