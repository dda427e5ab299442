#include "csrc/cpu/simd/isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <iterator>
#include <string>

#if defined(MOR_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "csrc/checks.h"

namespace mor {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// Linux gives a process the memory for tiles when it asks, and says no where they are not.
bool may_use_amx() {
#if defined(MOR_X86) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

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
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return may_use_amx() ? Isa::kAmxBf16 : Isa::kAvx512Bf16;
#else
  return Isa::kPortable;
#endif
}

const Isa kDetected = detect();
std::atomic<Isa> current{kDetected};

// "" only asks; a name forces that set for the process (tests), "best" returns to the detected one.
// No operator may be running: it asks more than once.
std::string instruction_set(std::string force) {
  if (force == "best") current = kDetected;
  else if (!force.empty()) {
    size_t level = 0;
    while (level < std::size(kNames) && force != kNames[level]) ++level;
    MOR_CHECK(
        level < std::size(kNames),
        "instruction_set: expected portable, avx2, avx512, avx512_bf16, amx_bf16 or best, got ",
        force);
    MOR_CHECK(level <= static_cast<size_t>(kDetected), "instruction_set: this machine has only ",
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
