// One bug for each sanitizer, in the builds of MOR_SANITIZE only: test_sanitizers.py sees to it
// that they are reported.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace {

using torch::stable::Tensor;

// Every thread adds to the first element.
void race(const Tensor& x) {
  auto* data = static_cast<int64_t*>(x.mutable_data_ptr());
  torch::stable::parallel_for(0, x.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[0] += i;
  });
}

// Reads the element after the last.
void past_the_end(const Tensor& x) {
  auto* data = static_cast<int64_t*>(x.mutable_data_ptr());
  data[0] = data[x.numel()];
}

void signed_overflow(const Tensor& x) {
  auto* data = static_cast<int64_t*>(x.mutable_data_ptr());
  data[0] += INT64_MAX;
}

}  // namespace

STABLE_TORCH_LIBRARY(mor_seeded_bugs, m) {
  m.def("race(Tensor(a!) x) -> ()");
  m.def("past_the_end(Tensor(a!) x) -> ()");
  m.def("signed_overflow(Tensor(a!) x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mor_seeded_bugs, CPU, m) {
  m.impl("race", TORCH_BOX(&race));
  m.impl("past_the_end", TORCH_BOX(&past_the_end));
  m.impl("signed_overflow", TORCH_BOX(&signed_overflow));
}
