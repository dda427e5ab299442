#include "../../../kernels/match/bipartite_match.cuh"

#include "binding.h"

SIMT_EXPORT int bipartite_match(int64_t dtype, const void* a, int64_t a_stride, const void* b,
                                int64_t b_stride, const int32_t* cu_seqlens_a,
                                const int32_t* cu_seqlens_b, void* a_norms, void* b_norms,
                                void* scores, int64_t* index, int64_t num_a, int64_t num_b,
                                int64_t width, int64_t num_sequences) {
  return simt::guarded([&] {
    return simt::dispatch_floating(dtype, [&]<class T>(T) {
      using Acc = mor::acc_t<T>;
      const mor::BipartiteMatchArgs<T> args{static_cast<const T*>(a),
                                            a_stride,
                                            static_cast<const T*>(b),
                                            b_stride,
                                            cu_seqlens_a,
                                            cu_seqlens_b,
                                            static_cast<Acc*>(a_norms),
                                            static_cast<Acc*>(b_norms),
                                            static_cast<Acc*>(scores),
                                            index,
                                            num_a,
                                            num_b,
                                            width,
                                            num_sequences};
      return mor::launch_bipartite_match(args, nullptr);
    });
  });
}
