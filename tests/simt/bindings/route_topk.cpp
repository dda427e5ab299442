#include "../../../kernels/routing/route_topk.cuh"

#include "binding.h"

SIMT_EXPORT int route_topk(const void* scores, int64_t dtype, int64_t k, const int64_t* k_each,
                           const int32_t* cu_seqlens, const uint8_t* candidates,
                           const uint8_t* protected_rows, int64_t* taken, int64_t* totals,
                           int64_t* starts, int64_t* ascending, int64_t* rows, int64_t num_rows,
                           int64_t num_sequences, int64_t num_selected) {
  const mor::RouteTopkArgs args{
      k,      k_each, cu_seqlens, candidates,    protected_rows, taken, totals,
      starts, rows,   num_rows,   num_sequences, num_selected,   0};
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      return mor::launch_route_topk(static_cast<const T*>(scores), args, ascending, nullptr);
    });
  });
}
