#include "gather_tokens.simd.h"

#include "simd/vec.h"

namespace mor {
namespace MOR_ISA {

void copy_rows(const char* in, int64_t stride, const int64_t* index, char* out, int64_t bytes,
               int64_t count, bool) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * bytes, in + index[i] * stride, bytes);
}

}  // namespace MOR_ISA
}  // namespace mor
