// 2^x for vectors of floats. Included by *.simd.cpp only.
#pragma once

#include "csrc/cpu/simd/vec.h"

namespace mor {
namespace MOR_ISA {

// Relative error 9e-8 for kDegree 6, 3e-6 for kDegree 4 (enough before a rounding to bfloat16);
// exactly 1 at 0. x below -126 may give 0, and x = -inf does; NaN stays NaN; x above 127 is
// undefined.
template <int kDegree>
inline VecF exp2_vec(VecF x) {
  static_assert(kDegree == 4 || kDegree == 6);
  // Minimax polynomials of 2^f on [0, 1] with value 1 at 0.
  constexpr float k4[] = {1.0f, 0.693044841f, 0.241280198f, 0.0522424728f, 0.0134266838f};
  constexpr float k6[] = {1.0f,           0.693147063f,  0.240229309f,   0.0554852821f,
                          0.00967545155f, 0.0012467847f, 0.000216129149f};
  const auto polynomial = [&](VecF f) {
    VecF p = splat(kDegree == 6 ? k6[6] : k4[4]);
#pragma GCC unroll 6
    for (int i = kDegree - 1; i >= 0; --i) p = p * f + splat(kDegree == 6 ? k6[i] : k4[i]);
    return p;
  };
#if defined(__AVX512F__)
  // x - floor(x), of -inf 0; the exponent's floor is taken by scalef itself.
  const VecF f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(f), x);
#else
  const VecF lowest = splat(-150.0f);
  x = x < lowest ? lowest : x;
  // 1.5 * 2^23: adding it rounds to an integer, x's floor, or for an odd x one less, with f = 1.
  const VecF magic = splat(12582912.0f);
  const VecF shifted = (x - splat(0.5f)) + magic;
  VecI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  VecF power;
  std::memcpy(&power, &bits, sizeof bits);
  const VecF result = polynomial(x - (shifted - magic)) * power;
  return x < splat(-126.0f) ? VecF{} : result;
#endif
}

}  // namespace MOR_ISA
}  // namespace mor
