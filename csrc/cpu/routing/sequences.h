// What the CPU operators that choose rows of sequences share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "csrc/cpu/routing/route_topk.simd.h"
#include "csrc/cpu/tuning.h"

namespace mor {

// Calls body(b, scratch) for each sequence, in parallel, with enough rows for each thread; scratch
// serves sequences of up to `longest` rows.
template <class Body>
void for_each_sequence(int64_t num_rows, int64_t num_sequences, int64_t longest, const Body& body) {
  const int64_t length = num_rows / std::max<int64_t>(num_sequences, 1) + 1;
  const int64_t grain = std::max<int64_t>(kRowsPerThread / length, 1);
  torch::stable::parallel_for(0, num_sequences, grain, [&](int64_t begin, int64_t end) {
    struct alignas(64) Line {
      char bytes[64];
    };
    const std::unique_ptr<Line[]> scratch(new Line[route_topk_scratch(longest) / 64 + 1]);
    for (int64_t b = begin; b < end; ++b) body(b, scratch.get());
  });
}

// The rows of `mask` that are not in `without` (or null).
inline int64_t count_rows(const uint8_t* mask, const uint8_t* without, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t i = begin; i < end; ++i) total += mask[i] & ~(without ? without[i] : 0);
  return total;
}

}  // namespace mor
