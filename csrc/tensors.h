// What operators ask of every call without going through the dispatcher, which costs 0.3 us each
// time: as much as a small operator itself.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <array>
#include <optional>

#include "checks.h"

namespace mor {

// Itself where it is.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(as_contiguous(*t)) : std::nullopt;
}

// A contiguous uninitialised tensor of up to four dimensions on the device of `like`.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         ScalarType dtype) {
  std::array<int64_t, 4> strides{1, 1, 1, 1};
  MOR_CHECK(sizes.size() <= strides.size(), "new_tensor: expected at most 4 dimensions, got ",
            sizes.size());
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  const auto device = like.device();
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), type, device.index(),
      &handle));
  return Tensor(handle);
}
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

}  // namespace mor
