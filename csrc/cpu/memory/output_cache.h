// Memory of large results. A fresh result of tens of MiB costs several times the copy into it, all
// of it page faults, and the C library gives such memory back to the system at once; so memory is
// cached after a large result is freed, up to a bound, and the next result of about its size is
// written there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>

namespace mor {

// A contiguous uninitialised tensor of these sizes, of dtype and device of `like`.
torch::stable::Tensor new_result(const torch::stable::Tensor& like,
                                 torch::headeronly::IntHeaderOnlyArrayRef sizes);

}  // namespace mor
