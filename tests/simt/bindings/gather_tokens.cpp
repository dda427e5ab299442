#include "../../../kernels/rows/gather_tokens.cuh"

#include "binding.h"

SIMT_EXPORT int gather_tokens(const void* x, const int64_t* rows, void* y, int64_t num_taken,
                              int64_t stride, int64_t bytes) {
  return simt::guarded(
      [&] { return mor::launch_gather_tokens(x, rows, y, num_taken, stride, bytes, nullptr); });
}
