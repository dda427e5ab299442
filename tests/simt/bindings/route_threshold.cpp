#include "../../../kernels/routing/route_threshold.cuh"

#include "binding.h"

SIMT_EXPORT int route_threshold(const void* scores, int64_t dtype, int64_t rule_kind,
                                int64_t inclusive, double threshold, const void* threshold_each,
                                int64_t each_is_double, int64_t min_k, int64_t max_k,
                                int64_t max_rows, const int32_t* cu_seqlens,
                                const uint8_t* candidates, int64_t* taken, int64_t* totals,
                                int64_t* counts, int32_t* chosen, int64_t* rows, int64_t num_rows,
                                int64_t num_sequences) {
  const mor::RouteThresholdArgs rule{static_cast<mor::RouteRule>(rule_kind),
                                     inclusive != 0,
                                     each_is_double != 0,
                                     threshold,
                                     threshold_each,
                                     min_k,
                                     max_k,
                                     max_rows,
                                     counts,
                                     chosen};
  mor::RouteTopkArgs args{};
  args.k_each = counts;
  args.cu_seqlens = cu_seqlens;
  args.candidates = candidates;
  args.taken = taken;
  args.totals = totals;
  args.rows = rows;
  args.num_rows = num_rows;
  args.num_sequences = num_sequences;
  args.num_selected = max_rows;
  args.fill = -1;
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      const T* data = static_cast<const T*>(scores);
      if (const cudaError_t error = mor::launch_route_threshold(data, args, rule, nullptr);
          error != cudaSuccess)
        return error;
      return mor::launch_route_topk(data, args, nullptr, nullptr);
    });
  });
}
