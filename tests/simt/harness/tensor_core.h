// mma.m16n8k16 and ldmatrix for the harness: the last lane of a warp to arrive does the work of
// all.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "simt.h"

namespace simt {

template <class T>
float element(uint32_t packed, int half) {
  const uint16_t bits = uint16_t(packed >> (16 * half));
  T value;
  std::memcpy(&value, &bits, sizeof bits);
  return float(value);
}

// d[16, 8] += a[16, 16] * b[16, 8]. Products are exact in double and the sum is rounded once; the
// hardware truncates aligned addends, an error of the same size.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site site = Site::here()) {
  struct Fragment {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  const Complete multiply = [](void* const payloads[32]) {
    float left[16][16], right[8][16];
    const auto lane_of = [&](int lane) -> Fragment& {
      return *static_cast<Fragment*>(payloads[lane]);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const Fragment& f = lane_of(lane);
      const int group = lane / 4, column = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) {
          left[group + r % 2 * 8][column + r / 2 * 8 + half] = element<T>(f.a[r], half);
        }
        for (int r = 0; r < 2; ++r) right[group][column + r * 8 + half] = element<T>(f.b[r], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        double sum = lane_of(lane).d[r];
        for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * right[column][k];
        lane_of(lane).d[r] = float(sum);
      }
    }
  };
  warp_exchange(&mine, multiply, site);
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  if ((reinterpret_cast<uintptr_t>(row) & 15) != 0) {
    fail("ldmatrix of a misaligned row at " + text(site));
  }
  shared_access(row, 16, false);
  struct Fragment {
    uint32_t* r;
    const void* row;
  } mine{r, row};
  const Complete load = [](void* const payloads[32]) {
    const auto lane_of = [&](int lane) { return static_cast<Fragment*>(payloads[lane]); };
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t m[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(m[i], lane_of(matrix * 8 + i)->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = TRANSPOSED ? m[j][i] : m[i][j];
        const uint32_t high = TRANSPOSED ? m[j + 1][i] : m[i][j + 1];
        lane_of(lane)->r[matrix] = low | high << 16;
      }
    }
  };
  warp_exchange(&mine, load, site);
}

}  // namespace simt
