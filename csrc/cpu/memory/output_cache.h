// Memory of large results. A fresh result of tens of MiB costs several times the copy into it, all
// of it page faults, and the C library gives such memory back to the system at once; so results
// that died are kept, up to a bound, and the next result of about their size is written there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>

namespace mor {

// Below it the C library's own reuse is as good.
constexpr int64_t kLargeResult = int64_t{4} << 20;

// At most this much is kept of results that died, the oldest leaves first.
constexpr int64_t kKeptResults = int64_t{256} << 20;

// A contiguous uninitialised tensor of these sizes, of dtype and device of `like`.
torch::stable::Tensor new_result(const torch::stable::Tensor& like,
                                 torch::headeronly::IntHeaderOnlyArrayRef sizes);

}  // namespace mor
