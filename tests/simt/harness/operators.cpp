// What the operators for the CPU have and those for CUDA lack: instruction sets, here one.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {
std::string instruction_set(std::string) { return "portable"; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mor, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
