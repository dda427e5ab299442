// Shared by every check_OP and by the dtype dispatch of both devices.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mor {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// As STD_TORCH_CHECK, whose message would begin with C++ function, file and line.
#define MOR_CHECK(condition, ...)                          \
  if (!(condition)) [[unlikely]] {                         \
    throw std::runtime_error(::mor::message(__VA_ARGS__)); \
  }

inline std::string shape_str(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

// PyTorch's name of a dtype, as Python shows it.
constexpr const char* dtype_str(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_str(const Tensor& t) {
  return t.is_cpu() ? "cpu" : "cuda:" + std::to_string(t.get_device_index());
}

constexpr bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// Called before other sizes are compared with this one. It leaves a t of another rank to the check
// of operands.
inline void check_head_dim(const Tensor& t, int64_t rank, const char* op) {
  const int64_t head_dim = t.dim() == rank ? t.size(rank - 1) : 1;
  MOR_CHECK(head_dim >= 1 && head_dim <= 256, op, ": expected head_dim in 1..256, got ", head_dim);
}

// cu_seqlens [B + 1], contiguous, on the CPU: starts at 0, never falls, ends at num_rows. Returns
// B.
inline int64_t check_cu_seqlens_values(const Tensor& cu_seqlens, int64_t num_rows, const char* op,
                                       const char* name) {
  const int64_t num_sequences = cu_seqlens.size(0) - 1;
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  MOR_CHECK(cu[0] == 0, op, ": expected ", name, " to start at 0, got ", cu[0]);
  for (int64_t b = 0; b < num_sequences; ++b) {
    MOR_CHECK(cu[b] <= cu[b + 1], op, ": expected ", name, " never to fall, got ", cu[b], " then ",
              cu[b + 1], " at ", b + 1);
  }
  MOR_CHECK(cu[num_sequences] == num_rows, op, ": expected ", name, " to end at ", num_rows,
            " (the number of rows), got ", cu[num_sequences]);
  return num_sequences;
}

// Calls body with a value of the C++ type of a floating dtype: dispatch_floating(x, [&]<class T>(T)
// { ... }).
template <class Body>
void dispatch_floating(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      return body(double{});
  }
}

}  // namespace mor
