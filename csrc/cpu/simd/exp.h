// 2^x for vectors of floats. Included by *.simd.cpp only.
#pragma once

#include "vec.h"

namespace mor {
namespace MOR_ISA {

// Relative error 8e-8 for kDegree 6, 3e-6 for kDegree 4 (enough before a rounding to bfloat16). x
// below -126 may give 0, and x = -inf does; NaN stays NaN; x above 127 is undefined.
template <int kDegree>
inline VecF exp2_vec(VecF x) {
  static_assert(kDegree == 4 || kDegree == 6);
  // Minimax polynomials of 2^f on [-1/2, 1/2].
  constexpr float k4[] = {0.999999285f, 0.693121791f, 0.240247443f, 0.0559178591f, 0.00957010221f};
  constexpr float k6[] = {1.0f,           0.693147182f,   0.240226462f,   0.0555032864f,
                          0.00961848907f, 0.00133999309f, 0.000153458124f};
  const auto polynomial = [&](VecF f) {
    VecF p = splat(kDegree == 6 ? k6[6] : k4[4]);
#pragma GCC unroll 6
    for (int i = kDegree - 1; i >= 0; --i) p = p * f + splat(kDegree == 6 ? k6[i] : k4[i]);
    return p;
  };
  const VecF lowest = splat(-150.0f);
#if defined(__AVX512F__)
  x = _mm512_max_ps(lowest, x);  // of a NaN the second
  const VecF n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(polynomial(x - n), n);
#else
  x = x < lowest ? lowest : x;
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF shifted = x + magic;
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
