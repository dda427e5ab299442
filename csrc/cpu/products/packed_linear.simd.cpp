#include "csrc/cpu/products/packed_linear.simd.h"

#include <algorithm>
#include <type_traits>

#include "csrc/cpu/memory/arena.h"
#include "csrc/cpu/simd/vec.h"

namespace mor {
namespace MOR_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;  // vectors of a panel
constexpr int64_t kStepBytes = 64;      // of a panel: one k of floats, or two of bfloat16
constexpr int64_t kAhead = 2048;        // bytes that a single tile prefetches ahead

// Rows of a tile: its sums, the weights and one value of x stay in registers.
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
#elif defined(__AVX2__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 3;
#endif

// Panels of a tile of few rows: enough independent sums to cover the latency of an addition.
constexpr int panels_of([[maybe_unused]] int rows) {
#if defined(__AVX512F__)
  return rows <= 3 ? 4 : rows <= 6 ? 2 : 1;
#elif defined(__AVX2__)
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
#else
  return 1;
#endif
}

// Vector v of one k of a panel; of bfloat16 the i-th k of two.
template <bool kHalves>
inline VecF load_weights(const char* w, int v, int i) {
  if constexpr (!kHalves) return load(reinterpret_cast<const float*>(w) + kLanes * v);
  const VecPair pair = load_pair(reinterpret_cast<const BFloat16*>(w) + 2 * kLanes * v);
  return i == 0 ? pair.even : pair.odd;
}

// What is prefetched during a tile: at each step of its sums `bytes` further, from `from` on.
struct Ahead {
  const char* from;
  int64_t bytes;
};

// Sums of R rows and Q panels. Each is one sum over k in ascending order, whatever R and Q are.
template <int R, int Q, bool kHalves>
inline void sum_tile(const float* x, int64_t x_stride, const char* packed, int64_t panel_bytes,
                     int64_t steps, Ahead ahead, VecF (&sums)[R][Q][kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) sums[r][q][v] = VecF{};
    }
  }
  constexpr int kInner = kHalves ? 2 : 1;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      const char* w = packed + q * panel_bytes + step * kStepBytes;
      __builtin_prefetch(ahead.from + q * panel_bytes + step * ahead.bytes);
#pragma GCC unroll 2
      for (int i = 0; i < kInner; ++i) {
        VecF weights[kVecs];
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) weights[v] = load_weights<kHalves>(w, v, i);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const VecF value = splat(x[r * x_stride + kInner * step + i]);
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) sums[r][q][v] += weights[v] * value;
        }
      }
    }
  }
}

template <class T>
void store_panel(const PackedLinear& args, int64_t row, int64_t panel, const VecF (&sums)[kVecs]) {
  const int64_t first = panel * kPanel, count = std::min(args.dims.num_outputs - first, kPanel);
  T* y = static_cast<T*>(args.y) + row * args.dims.num_outputs + first;
  const T* bias = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + first;
  if (count == kPanel) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t at = v * kLanes;
      store(y + at, bias == nullptr ? sums[v] : sums[v] + load(bias + at));
    }
    return;
  }
  T padded[kPanel] = {};
  T out[kPanel];
  if (bias != nullptr) std::copy(bias, bias + count, padded);
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * kLanes;
    store(out + at, bias == nullptr ? sums[v] : sums[v] + load(padded + at));
  }
  std::copy(out, out + count, y);
}

// Rows row .. row + R - 1 and panels [begin, end), which lie at `packed`. `ahead` is of the first.
template <int R, bool kHalves, class T>
void run_rows(const PackedLinear& args, const char* packed, int64_t steps, int64_t row,
              int64_t begin, int64_t end, Ahead ahead) {
  constexpr int Q = panels_of(R);
  const int64_t panel_bytes = steps * kStepBytes;
  const float* x = args.x + row * args.x_stride;
  int64_t panel = begin;
  const auto next = [&](int panels) {
    panel += panels;
    packed += panels * panel_bytes;
    ahead.from += panels * panel_bytes;
  };
  for (; panel + Q <= end; next(Q)) {
    VecF sums[R][Q][kVecs];
    sum_tile<R, Q, kHalves>(x, args.x_stride, packed, panel_bytes, steps, ahead, sums);
    for (int r = 0; r < R; ++r) {
      for (int q = 0; q < Q; ++q) store_panel<T>(args, row + r, panel + q, sums[r][q]);
    }
  }
  for (; panel < end; next(1)) {
    VecF sums[R][1][kVecs];
    sum_tile<R, 1, kHalves>(x, args.x_stride, packed, panel_bytes, steps, ahead, sums);
    for (int r = 0; r < R; ++r) store_panel<T>(args, row + r, panel, sums[r][0]);
  }
}

template <int R, bool kHalves, class T>
void run_rows_of(int64_t rows, const PackedLinear& args, const char* packed, int64_t steps,
                 int64_t row, int64_t begin, int64_t end, Ahead ahead) {
  if (rows == R) return run_rows<R, kHalves, T>(args, packed, steps, row, begin, end, ahead);
  if constexpr (R > 1) {
    run_rows_of<R - 1, kHalves, T>(rows, args, packed, steps, row, begin, end, ahead);
  }
}

// Weights of one panel as floats, one k after the other.
void widen_panel(const char* packed, int64_t steps, float* out) {
  for (int64_t step = 0; step < steps; ++step, packed += kStepBytes) {
    for (int i = 0; i < 2; ++i, out += kPanel) {
      for (int v = 0; v < kVecs; ++v) store(out + v * kLanes, load_weights<true>(packed, v, i));
    }
  }
}

template <bool kHalves>
void run(const PackedLinear& args, int64_t begin, int64_t end) {
  using T = std::conditional_t<kHalves, BFloat16, float>;
  const int64_t num_rows = args.dims.num_rows;
  const int64_t steps = kHalves ? (args.dims.num_inputs + 1) / 2 : args.dims.num_inputs;
  const int64_t panel_bytes = steps * kStepBytes;
  const char* packed = static_cast<const char*>(args.packed) + begin * panel_bytes;
  if (num_rows == 0) return;
  if (num_rows <= kMaxRows) {
    const Ahead ahead{packed + kAhead, kStepBytes};
    return run_rows_of<kMaxRows, kHalves, T>(num_rows, args, packed, steps, 0, begin, end, ahead);
  }
  // Tiles of nearly equal height. Each panel is read from memory once, and from the cache by the
  // other tiles; bfloat16 is widened once for all of them where there are several. All tiles of a
  // panel together prefetch the next one: reading it takes as long as several of them do.
  const int64_t tiles = (num_rows + kMaxRows - 1) / kMaxRows;
  const bool widens = kHalves && tiles > 2;
  const Scratch widened = allocate(widens ? 2 * panel_bytes : 0);
  for (int64_t panel = begin; panel < end; ++panel, packed += panel_bytes) {
    if (widens) widen_panel(packed, steps, reinterpret_cast<float*>(widened.get()));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * num_rows / tiles, after = (tile + 1) * num_rows / tiles;
      Ahead ahead{packed + panel_bytes + tile * panel_bytes / tiles, kStepBytes / tiles + 1};
      if (widens) {
        ahead.bytes = kStepBytes / 2 / tiles + 1;
        run_rows_of<kMaxRows, false, T>(after - row, args, widened.get(), 2 * steps, row, panel,
                                        panel + 1, ahead);
      } else {
        run_rows_of<kMaxRows, kHalves, T>(after - row, args, packed, steps, row, panel, panel + 1,
                                          ahead);
      }
    }
  }
}

}  // namespace

void packed_linear_panels(const PackedLinear& args, int64_t begin, int64_t end) {
  args.halves ? run<true>(args, begin, end) : run<false>(args, begin, end);
}

void widen_row(const torch::headeronly::BFloat16* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

}  // namespace MOR_ISA
}  // namespace mor
