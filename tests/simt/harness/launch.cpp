// Launches: what the CUDA runtime would refuse, shared memory, and one block after another.
#include <cstdlib>
#include <map>
#include <numeric>

#include "engine.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

constexpr size_t kDefaultDynamicShared = 48 * 1024, kMaxShared = 227 * 1024;

std::map<const void*, size_t>& allowed_dynamic_shared() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

// Dynamic shared memory of exactly the size asked for, so that ASan sees its end.
struct DynamicShared {
  explicit DynamicShared(size_t bytes) : padded((bytes + 127) / 128 * 128), bytes(bytes) {
    engine.shared_bytes = bytes;
    engine.shared = bytes > 0 ? static_cast<unsigned char*>(aligned_alloc(128, padded)) : nullptr;
#if defined(SIMT_ASAN)
    if (bytes > 0) __asan_poison_memory_region(engine.shared + bytes, padded - bytes);
#endif
  }
  ~DynamicShared() {
#if defined(SIMT_ASAN)
    if (bytes > 0) __asan_unpoison_memory_region(engine.shared + bytes, padded - bytes);
#endif
    free(engine.shared);
    engine.shared = nullptr;
    engine.running = nullptr;
    self = nullptr;
  }
  size_t padded, bytes;
};

void check_launch(const std::string& name, const void* kernel, Dim grid, Dim block,
                  size_t dynamic_bytes) {
  const auto refuse = [&](const std::string& what) { throw Error(name + ": " + what); };
  const size_t num_threads = size_t(block.x) * block.y * block.z;
  if (engine.running != nullptr) refuse("launched from a kernel");
  if (num_threads == 0 || num_threads > 1024 || block.z > 64) refuse("impossible block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    refuse("impossible grid");
  }
  const auto allowed = allowed_dynamic_shared().find(kernel);
  const size_t limit =
      allowed == allowed_dynamic_shared().end() ? kDefaultDynamicShared : allowed->second;
  if (dynamic_bytes > limit) {
    refuse(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory, allowed " +
           std::to_string(limit));
  }
}

}  // namespace

void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxShared) {
    throw Error(std::to_string(bytes) + " bytes of dynamic shared memory asked for, there are " +
                std::to_string(kMaxShared));
  }
  allowed_dynamic_shared()[kernel] = bytes;
}

void launch(const char* name, const void* kernel, Dim grid, Dim block, size_t dynamic_bytes,
            const std::function<void()>& body) {
  check_launch(name, kernel, grid, block, dynamic_bytes);
  const size_t num_threads = size_t(block.x) * block.y * block.z;
  reserve_stacks(num_threads);
  engine.fibers.resize(num_threads);
  engine.kernel_name = name;
  engine.body = &body;
  engine.error.clear();
  engine.random.seed(unsigned(engine.order));
  const DynamicShared shared(dynamic_bytes);
  if (hooks.launch_begin != nullptr) hooks.launch_begin();
  std::vector<int> blocks(size_t(grid.x) * grid.y * grid.z), order;
  std::iota(blocks.begin(), blocks.end(), 0);
  append_in_order(order, std::move(blocks));
  for (int b : order) {
    const unsigned linear = unsigned(b);
    run_block({linear % grid.x, linear / grid.x % grid.y, linear / (grid.x * grid.y)}, block, grid);
  }
  if (hooks.launch_end != nullptr) hooks.launch_end();
}

}  // namespace simt
