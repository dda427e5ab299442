// pybind11 only, no torch header: quick to compile, no dependence on torch's ABI.
#include <pybind11/pybind11.h>

namespace {

// What the compiler was, for `mor info` and bug reports.
const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side classes of mor, free of tensors.";
  m.def("compiler", &compiler, "Name and version of the C++ compiler that built this module.");
}
