#include "csrc/cpu/memory/output_cache.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <iterator>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "csrc/cpu/tuning.h"
#include "csrc/tensors.h"

namespace mor {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t block_bytes(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

struct Block {
  void* data;
  int64_t bytes;
};

class KeptBlocks {
 public:
  // A kept block of at least `bytes` and little more, or a new one. The lock is never waited for:
  // in a forked child it may be held by a thread that does not exist there.
  Block take(int64_t bytes) {
    const int64_t size = block_bytes(bytes);
    if (std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      auto best = blocks_.end();
      for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
        if (b->bytes >= bytes && b->bytes <= size + bytes / 4 &&
            (best == blocks_.end() || b->bytes <= best->bytes))
          best = b;  // of one size the last one freed: it may still lie in the cache
      if (best != blocks_.end()) {
        const Block block = *best;
        blocks_.erase(best);
        kept_ -= block.bytes;
        return block;
      }
    }
    return allocate(bytes, size);
  }

  void give(Block block) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kKeptResults) return std::free(block.data);
    blocks_.push_back(block);
    for (kept_ += block.bytes; kept_ > kKeptResults; blocks_.erase(blocks_.begin())) {
      std::free(blocks_.front().data);
      kept_ -= blocks_.front().bytes;
    }
  }

 private:
  static Block allocate(int64_t bytes, int64_t size) {
    void* data = std::aligned_alloc(kHugePage, size);
    MOR_CHECK(data != nullptr, "mor: no memory for a result of ", bytes, " bytes");
#if defined(__linux__)
    // Only advice. The last page in part used stays in small ones: no memory beyond the result.
    madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return {data, size};
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // in the order they were freed
  int64_t kept_ = 0;
};

// Never destroyed: tensors may be freed after it would be.
KeptBlocks& kept_blocks() {
  static auto* blocks = new KeptBlocks;
  return *blocks;
}

}  // namespace

torch::stable::Tensor new_result(const torch::stable::Tensor& like,
                                 torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  int64_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kLargeResult) return new_tensor(like, sizes);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  const Block block = kept_blocks().take(bytes);
  return torch::stable::from_blob(block.data, sizes, strides, like.device(), like.scalar_type(),
                                  [block](void*) { kept_blocks().give(block); });
}

}  // namespace mor
