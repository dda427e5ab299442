// packed_linear: y = x W^T + bias for few rows, with W packed once.
//   x       [N, K] float32 or bfloat16; any strides, free of a copy where a row is contiguous
//   packed  W [M, K] in panels of 16 outputs, in the dtype of x; zeros beyond M and K:
//           float32   [ceil(M / 16), K, 16]: packed[p, k, j] = W[16 p + j, k]
//           bfloat16  [ceil(M / 16), ceil(K / 2), 16, 2]: packed[p, k, j, i] = W[16 p + j, 2 k + i]
//   bias    [M] as x, optional
//   y       [N, M], contiguous
// Each result is one sum over k in ascending order, in float32, rounded once. So a row of y depends
// on its row of x alone, to the last bit: not on the rows beside it, nor on the number of threads.
// (It does depend on the instruction set: whether products are rounded before they are added.)
// Decoding waits for the weights: they are read once for all rows, in the order they lie in memory.
// Not differentiable. Empty inputs give empty outputs; K = 0 gives the bias.
#pragma once

#include <optional>

#include "../operands.h"

namespace mor {

constexpr int64_t kPanel = 16;  // outputs of a panel

struct PackedLinearDims {
  int64_t num_rows;     // N
  int64_t num_inputs;   // K
  int64_t num_outputs;  // M
};

inline constexpr Operands kPackedLinearOperands{
    "packed_linear",
    {{"x", "[N, K]", "float32 or bfloat16"}, {"packed", "", "same"}, {"bias", "[M]", "same"}}};

inline PackedLinearDims check_packed_linear(const Tensor& x, const Tensor& packed,
                                            int64_t num_outputs,
                                            const std::optional<Tensor>& bias) {
  const char* op = "packed_linear";
  kPackedLinearOperands.check({&x, &packed, pointer(bias)});
  const bool halves = x.scalar_type() == ScalarType::BFloat16;
  MOR_CHECK(num_outputs >= 0, op, ": expected num_outputs >= 0, got ", num_outputs);
  const int64_t panels = (num_outputs + kPanel - 1) / kPanel, k = x.size(1);
  const bool fits = halves ? packed.dim() == 4 && packed.size(0) == panels &&
                                 packed.size(1) == (k + 1) / 2 && packed.size(2) == kPanel &&
                                 packed.size(3) == 2
                           : packed.dim() == 3 && packed.size(0) == panels && packed.size(1) == k &&
                                 packed.size(2) == kPanel;
  MOR_CHECK(fits, op, ": expected packed of pack_linear for ", num_outputs, " outputs and x ",
            shape_str(x), ", got ", shape_str(packed));
  MOR_CHECK(!bias.has_value() || bias->size(0) == num_outputs, op, ": expected bias of ",
            num_outputs, " elements, got ", shape_str(*bias));
  return {x.size(0), k, num_outputs};
}

}  // namespace mor
