// Run-time choice of the instruction set. A file NAME.simd.cpp is compiled once per set, its
// functions in the namespace mor::MOR_ISA; NAME.cpp calls the one for this machine by
// MOR_BEST(function). AMX has no kernel text of its own: the kernels of avx512_bf16 ask for it.
#pragma once

namespace mor {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

Isa isa();  // the best of this machine, unless instruction_set chose a lesser one

// Declares RETURN NAME(ARGS...) for every instruction set.
#if defined(MOR_X86)
#define MOR_DECLARE_SIMD(RETURN, NAME, ...) \
  namespace portable {                      \
  RETURN NAME(__VA_ARGS__);                 \
  }                                         \
  namespace avx2 {                          \
  RETURN NAME(__VA_ARGS__);                 \
  }                                         \
  namespace avx512 {                        \
  RETURN NAME(__VA_ARGS__);                 \
  }                                         \
  namespace avx512_bf16 {                   \
  RETURN NAME(__VA_ARGS__);                 \
  }
#define MOR_BEST(NAME)                                                          \
  ::mor::best(&::mor::portable::NAME, &::mor::avx2::NAME, &::mor::avx512::NAME, \
              &::mor::avx512_bf16::NAME)
template <class F>
F best(F portable, F avx2, F avx512, F avx512_bf16) {
  switch (isa()) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
    case Isa::kAmxBf16:
      return avx512_bf16;
    default:
      return portable;
  }
}
#else
#define MOR_DECLARE_SIMD(RETURN, NAME, ...) \
  namespace portable {                      \
  RETURN NAME(__VA_ARGS__);                 \
  }
#define MOR_BEST(NAME) (&::mor::portable::NAME)
#endif

}  // namespace mor
