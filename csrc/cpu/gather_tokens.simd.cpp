#include "gather_tokens.simd.h"

#include "simd/vec.h"

namespace mor {
namespace MOR_ISA {

void add_row_f32(float* sum, const float* x, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(sum + d, load(sum + d) + load(x + d));
  for (; d < width; ++d) sum[d] += x[d];
}

}  // namespace MOR_ISA
}  // namespace mor
