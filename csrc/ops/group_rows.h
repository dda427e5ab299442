// group_rows: stable counting sort of the rows 0 .. N - 1 by key (recursion depth, "continues",
// expert, destination).
//   keys        [N] int64, int32 or bool, each in [0, num_keys)
//   cu_seqlens  [B + 1] int32, optional: sequence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]
//   rows        [N] int64: the rows of key 0, then of key 1, ...; ascending for each key
//   offsets     [num_keys + 1] int64: rows[offsets[key] : offsets[key + 1]] have that key; with
//               cu_seqlens [num_keys * B + 1], and offsets[key * B + b] starts sequence b of key
// A key out of range or bad cu_seqlens are errors on the CPU; on CUDA keys are clamped to
// [0, num_keys) and cu_seqlens to [0, N]. The result is unique, so deterministic for any number of
// threads. No host synchronisation. Not differentiable. MoR paper, section 2.2.1 (token-choice).
#pragma once

#include <optional>

#include "../operands.h"

namespace mor {

struct GroupRowsDims {
  int64_t num_rows;       // N
  int64_t num_keys;       // K
  int64_t num_sequences;  // B; 1 without cu_seqlens
};

inline constexpr Operands kGroupRowsOperands{
    "group_rows", {{"keys", "[N]", "int64, int32 or bool"}, {"cu_seqlens", "[B + 1]", "int32"}}};

inline GroupRowsDims check_group_rows(const Tensor& keys, int64_t num_keys,
                                      const std::optional<Tensor>& cu_seqlens) {
  kGroupRowsOperands.check({&keys, pointer(cu_seqlens)});
  MOR_CHECK(num_keys >= 1, "group_rows: expected num_keys >= 1, got ", num_keys);
  return {keys.size(0), num_keys, cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : 1};
}

}  // namespace mor
