// The few PTX instructions for which CUB writes inline assembly: make_cub_overlay.py puts these
// calls in its place. Included after cuda_words.h.
#pragma once

#include "cuda_words.h"

namespace simt {

template <WarpOp OP, class T>
T ptx_shuffle(T value, int b, int c, unsigned mask, Site site = Site::here()) {
  return unpack<T>(warp_collective(OP, mask, pack(value), b, c, site).value);
}

template <WarpOp OP, class T>
T ptx_shuffle_add(T value, int b, int c, unsigned mask, Site site = Site::here()) {
  const WarpResult other = warp_collective(OP, mask, pack(value), b, c, site);
  return other.in_range ? T(unpack<T>(other.value) + value) : value;
}

// Lanes whose label agrees with this lane's in one bit.
inline unsigned ptx_ballot_bit(unsigned label, unsigned bit, Site site = Site::here()) {
  const unsigned votes = __ballot_sync(~0u, (label & bit) != 0, site);
  return label & bit ? votes : ~votes;
}

inline unsigned ptx_bit_field(unsigned value, unsigned start, unsigned length) {
  start &= 255;
  length &= 255;
  if (start > 31 || length == 0) return 0;
  value >>= start;
  return length > 31 ? value : value & ((1u << length) - 1);
}

// Loads and stores with a cache or order modifier: threads of other blocks may be waited for by
// them, so they are neither reported as races nor allowed to spin without yielding.
template <class Unit, class P, class... Out>
SIMT_UNINSTRUMENTED void ptx_load(P p, Out&... out) {
  yield();
  const auto* from = reinterpret_cast<const Unit*>(p);
  ((out = Out(*from++)), ...);
}
template <class Unit, class P, class... In>
SIMT_UNINSTRUMENTED void ptx_store(P p, In... in) {
  auto* to = reinterpret_cast<Unit*>(p);
  ((*to++ = Unit(in)), ...);
}

}  // namespace simt
