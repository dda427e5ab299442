#include "bipartite_match.cuh"

#include <tuple>

#include "../../csrc/ops/bipartite_match.h"
#include "../../csrc/rows.h"
#include "../glue.h"

namespace mor {
namespace {

std::tuple<Tensor, Tensor> bipartite_match_cuda(const Tensor& a_in, const Tensor& b_in,
                                                const Tensor& cu_seqlens_a_in,
                                                const Tensor& cu_seqlens_b_in, std::string metric) {
  const auto dims = check_bipartite_match(a_in, b_in, cu_seqlens_a_in, cu_seqlens_b_in, metric);
  const DeviceGuard guard(a_in.get_device_index());
  const Rows a = contiguous_rows(a_in), b = contiguous_rows(b_in);
  const Tensor cu_seqlens_a = as_contiguous(cu_seqlens_a_in),
               cu_seqlens_b = as_contiguous(cu_seqlens_b_in);
  const auto total =
      a_in.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor scores = new_tensor(a_in, {dims.num_a}, total);
  Tensor index = new_tensor(a_in, {dims.num_a}, ScalarType::Long);
  Tensor norms = new_tensor(a_in, {dims.cosine ? dims.num_a + dims.num_b : 0}, total);
  dispatch_floating_cuda(a_in.scalar_type(), [&]<class T>(T) {
    BipartiteMatchArgs<T> args{};
    args.a = static_cast<const T*>(a.data);
    args.a_stride = a.stride;
    args.b = static_cast<const T*>(b.data);
    args.b_stride = b.stride;
    args.cu_seqlens_a = cu_seqlens_a.const_data_ptr<int32_t>();
    args.cu_seqlens_b = cu_seqlens_b.const_data_ptr<int32_t>();
    if (dims.cosine) {
      args.a_norms = static_cast<acc_t<T>*>(norms.mutable_data_ptr());
      args.b_norms = args.a_norms + dims.num_a;
    }
    args.scores = static_cast<acc_t<T>*>(scores.mutable_data_ptr());
    args.index = index.mutable_data_ptr<int64_t>();
    args.num_a = dims.num_a;
    args.num_b = dims.num_b;
    args.width = dims.width;
    args.num_sequences = dims.num_sequences;
    check_launch(launch_bipartite_match(args, current_stream(a_in)), "bipartite_match");
  });
  return {scores, index};
}

}  // namespace
}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, MOR_DEVICE_KEY, m) {
  m.impl("bipartite_match", TORCH_BOX(&mor::bipartite_match_cuda));
}
