#include "csrc/cpu/rows/gather_tokens.simd.h"

#include "csrc/cpu/rows/row.h"

namespace mor {
namespace MOR_ISA {
namespace {

template <bool kStream>
void copy(const char* in, int64_t stride, const int64_t* index, char* out, int64_t bytes,
          int64_t count) {
  const int64_t ahead = rows_ahead(bytes);
  for (int64_t i = 0; i < count; ++i) {
    const char* next = in + index[std::min(i + ahead, count - 1)] * stride;
    copy_row<kStream>(out + i * bytes, in + index[i] * stride, bytes, next);
  }
}

// Rows of one element: positions, depths, gates.
template <class T>
void copy_elements(const char* in, int64_t stride, const int64_t* index, char* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(out + i * sizeof(T), in + index[i] * stride, sizeof(T));
}

}  // namespace

void copy_rows(const char* in, int64_t stride, const int64_t* index, char* out, int64_t bytes,
               int64_t count, bool stream) {
  if (stream) {
    copy<true>(in, stride, index, out, bytes, count);
    return stream_fence();
  }
  switch (bytes) {
    case 8:
      return copy_elements<int64_t>(in, stride, index, out, count);
    case 4:
      return copy_elements<int32_t>(in, stride, index, out, count);
    case 2:
      return copy_elements<int16_t>(in, stride, index, out, count);
    default:
      return copy<false>(in, stride, index, out, bytes, count);
  }
}

}  // namespace MOR_ISA
}  // namespace mor
