#include "../../../kernels/routing/group_rows.cuh"

#include "binding.h"

SIMT_EXPORT int group_rows(const void* keys, int64_t key_bytes, const int32_t* cu_seqlens,
                           int64_t* counts, int64_t* rows, int64_t* offsets, int64_t num_rows,
                           int64_t num_keys, int64_t num_sequences, int64_t num_chunks) {
  const mor::GroupRowsArgs args{cu_seqlens, counts,   rows,          offsets,
                                num_rows,   num_keys, num_sequences, num_chunks};
  return simt::guarded([&] {
    if (key_bytes == 8)
      return mor::launch_group_rows(static_cast<const int64_t*>(keys), args, nullptr);
    if (key_bytes == 4)
      return mor::launch_group_rows(static_cast<const int32_t*>(keys), args, nullptr);
    return mor::launch_group_rows(static_cast<const uint8_t*>(keys), args, nullptr);
  });
}
