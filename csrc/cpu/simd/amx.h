// Matrix products of bfloat16 pairs on the tiles of AMX. Included by gemm.h only, for avx512_bf16:
// tiles are a matter of the machine (Isa::kAmxBf16), not of a kernel text of their own.
#pragma once

#include <immintrin.h>

#include "csrc/cpu/simd/isa.h"
#include "csrc/cpu/simd/vec.h"

namespace mor {
namespace MOR_ISA {

constexpr int kTile = 16;  // rows of a tile, and elements of 4 bytes in one

// Makes the tiles of this thread 16 rows of 64 bytes, and in the end what they were: others use
// them too. Assembly, because GCC's intrinsics say of the 64 bytes only that they touch the
// first 8.
class Tiles {
 public:
  Tiles() : used_(isa() == Isa::kAmxBf16) {
    if (!used_) return;
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config all{};
    all.palette = 1;
    for (int tile = 0; tile < 8; ++tile) all.bytes[tile] = 64, all.rows[tile] = kTile;
    asm volatile("ldtilecfg %0" ::"m"(all));
  }
  ~Tiles() {
    if (used_) asm volatile("ldtilecfg %0" ::"m"(before_));
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {  // as the instruction reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  const bool used_;
  Config before_;
};

// C += A B, or C = A B, as in gemm.h, of which it is a part: `depth` is a multiple of kTile,
// element (m, r) of A lies at a[m * kRowA + r], and `rows` is rounded up to a multiple of kTile.
template <int kVectors, int kRowA, int kRowB, int kRowC, bool kAdd>
void multiply_on_tiles(int64_t rows, int64_t depth, const uint32_t* a, const uint32_t* b,
                       float* c) {
  static_assert(kVectors <= 2);
  asm volatile("" ::: "memory");  // GCC's intrinsics do not say that they read memory
  for (int64_t m = 0; m < rows; m += 2 * kTile, a += 2 * kTile * kRowA, c += 2 * kTile * kRowC) {
    const bool two = rows - m > kTile;  // tiles of A
    float* lower = c + kTile * kRowC;
    if constexpr (kAdd) {
      _tile_loadd(0, c, kRowC * 4);
      if constexpr (kVectors == 2) _tile_loadd(1, c + kTile, kRowC * 4);
      if (two) {
        _tile_loadd(2, lower, kRowC * 4);
        if constexpr (kVectors == 2) _tile_loadd(3, lower + kTile, kRowC * 4);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t r = 0; r < depth; r += kTile) {
      _tile_loadd(4, a + r, kRowA * 4);
      _tile_loadd(6, b + r * kRowB, kRowB * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kVectors == 2) {
        _tile_loadd(7, b + r * kRowB + kTile, kRowB * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (!two) continue;
      _tile_loadd(5, a + kTile * kRowA + r, kRowA * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kVectors == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, kRowC * 4);
    if constexpr (kVectors == 2) _tile_stored(1, c + kTile, kRowC * 4);
    if (!two) continue;
    _tile_stored(2, lower, kRowC * 4);
    if constexpr (kVectors == 2) _tile_stored(3, lower + kTile, kRowC * 4);
  }
  asm volatile("" ::: "memory");
}

}  // namespace MOR_ISA
}  // namespace mor
