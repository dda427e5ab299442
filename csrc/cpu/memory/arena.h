// Uninitialised memory for one call, aligned to a cache line.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace mor {

struct FreeDeleter {
  void operator()(char* p) const { std::free(p); }
};

using Scratch = std::unique_ptr<char, FreeDeleter>;

inline Scratch allocate(int64_t bytes) {
  return Scratch(
      static_cast<char*>(std::aligned_alloc(64, (std::max<int64_t>(bytes, 1) + 63) / 64 * 64)));
}

}  // namespace mor
