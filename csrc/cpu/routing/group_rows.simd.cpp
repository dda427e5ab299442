// 64 rows at a time: each key becomes a bit mask of the rows that have it, and the mask a popcount
// or ascending rows. A scalar counting sort waits for its own counters when keys repeat.
#include "csrc/cpu/routing/group_rows.simd.h"

#include <type_traits>

#include "csrc/cpu/routing/compact.h"
#include "csrc/cpu/tuning.h"

namespace mor {
namespace MOR_ISA {
namespace {

template <class Key>
void encode(const Key* keys, int64_t num_rows, uint8_t* codes) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const auto key = static_cast<std::make_unsigned_t<Key>>(keys[i]);
    codes[i] = static_cast<uint8_t>(key < kMaxMaskedKeys ? key : kMaxMaskedKeys);
  }
}

// Calls body(row, block, valid) for each block of codes; bits of `valid` are rows before last.
template <class Body>
void for_each_block(const uint8_t* codes, int64_t first, int64_t last, const Body& body) {
  for (int64_t row = first; row < last; row += kBlock) {
    const int64_t count = last - row;
    uint8_t padded[kBlock] = {};
    if (count < kBlock) std::memcpy(padded, codes + row, count);
    body(row, count < kBlock ? padded : codes + row, first_bits(count));
  }
}

}  // namespace

void group_rows_count(const void* keys, int key_bytes, int64_t num_rows, int64_t num_keys,
                      int64_t* counts, uint8_t* codes) {
  if (key_bytes == 8) encode(static_cast<const int64_t*>(keys), num_rows, codes);
  else if (key_bytes == 4) encode(static_cast<const int32_t*>(keys), num_rows, codes);
  else encode(static_cast<const uint8_t*>(keys), num_rows, codes);
  for_each_block(codes, 0, num_rows, [&](int64_t, const uint8_t* block, uint64_t valid) {
    for (int64_t key = 0; key < num_keys; ++key)
      counts[key] += __builtin_popcountll(equal_bits(block, static_cast<uint8_t>(key)) & valid);
  });
}

void group_rows_write(const uint8_t* codes, int64_t first, int64_t last, int64_t num_keys,
                      int64_t* next, int64_t* rows) {
  for_each_block(codes, first, last, [&](int64_t row, const uint8_t* block, uint64_t valid) {
    uint64_t
        masks[kMaxMaskedKeys];  // all before any row is written: the stores may alias the codes
    for (int64_t key = 0; key < num_keys; ++key)
      masks[key] = equal_bits(block, static_cast<uint8_t>(key)) & valid;
    for (int64_t key = 0; key < num_keys; ++key)
      next[key] = write_rows(masks[key], row, rows + next[key]) - rows;
  });
}

}  // namespace MOR_ISA
}  // namespace mor
