#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>

#include "../../checks.h"

namespace mor {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa detect() {
#if defined(MOR_X86)
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))) {
    return Isa::kPortable;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd"))) {
    return Isa::kAvx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

const Isa kDetected = detect();
std::atomic<Isa> current{kDetected};

// "" only asks; a name forces that set for the process (tests), "best" returns to the detected one.
std::string instruction_set(std::string force) {
  if (force == "best") current = kDetected;
  else if (!force.empty()) {
    int level = 0;
    while (level < 4 && force != kNames[level]) ++level;
    MOR_CHECK(level < 4,
              "instruction_set: expected portable, avx2, avx512, avx512_bf16 or best, got ", force);
    MOR_CHECK(level <= static_cast<int>(kDetected), "instruction_set: this machine has only ",
              kNames[static_cast<int>(kDetected)], ", not ", force);
    current = static_cast<Isa>(level);
  }
  return kNames[static_cast<int>(current.load())];
}

}  // namespace

Isa isa() { return current.load(std::memory_order_relaxed); }

}  // namespace mor

STABLE_TORCH_LIBRARY_IMPL(mor, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&mor::instruction_set));
}
