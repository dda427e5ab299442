// A matrix product whose result is used up as it appears: rows of a lie in vector lanes (a panel,
// packed once for all of b), a tile of rows of b is multiplied by the panel, and its similarities
// go into a running maximum for each lane.
#include "csrc/cpu/match/bipartite_match.simd.h"

#include <cmath>

#include "csrc/cpu/simd/gemm.h"
#include "csrc/cpu/simd/transpose.h"

namespace mor {
namespace MOR_ISA {
namespace {

constexpr int kVectors = 3;
constexpr int kWidth = kVectors * kLanes;  // rows of a in a panel
constexpr int64_t kBlockRows = 64;         // rows of b converted at a time
constexpr int64_t kMostTileRows = 16;      // of a tile of AMX, and a multiple of kTileRows
constexpr int64_t kDepth = 256;            // elements of a row in one pass: what stays in cache
constexpr int64_t kPitch = kDepth + 16;    // between rows of b: an odd number of cache lines

// Values of the reduction in one element (simd/gemm.h).
template <class E>
constexpr int64_t kPerElement = sizeof(E) == 4 && !std::is_same_v<E, float> ? 2 : 1;

template <class E>
int64_t depth_of(int64_t width) {
  return (width + kPerElement<E> - 1) / kPerElement<E>;
}
int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Values [begin, end) of a row as elements.
template <class T>
void convert(const T* row, int64_t begin, int64_t end, float* to) {
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) store(to + d - begin, load(row + d));
  for (; d < end; ++d) to[d - begin] = static_cast<float>(row[d]);
}
template <class T>
void convert(const T* row, int64_t begin, int64_t end, uint32_t* to) {
  if ((end - begin) % 2 != 0) to[(end - begin) / 2] = 0;
  if (end > begin) std::memcpy(to, row + begin, (end - begin) * sizeof(T));  // else row may be null
}

// 1 / |row|, 0 for a row of zeros.
template <class T>
float inverse_norm(const T* row, int64_t width) {
  VecF squares[4]{};
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      const VecF v = load(row + d + u * kLanes);
      squares[u] += v * v;
    }
  }
  float sum = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; d < width; ++d) sum += static_cast<float>(row[d]) * static_cast<float>(row[d]);
  return sum > 0 ? 1 / std::sqrt(sum) : 0;
}

// Scratch of a task: panels of a, one block of b, and what is known of each row.
template <class E>
struct Work {
  E *panels, *block, *lines;
  float *a_norms, *b_norms, *best;
  int32_t* index;  // within the rows of b of the sequence, or -1
  float* tile;     // [kBlockRows, kWidth] similarities
  int64_t bytes;

  Work(void* memory, int64_t width, int64_t rows) {
    const int64_t depth = depth_of<E>(width), padded = round_up(rows, kWidth);
    auto* next = static_cast<char*>(memory);
    const auto take = [&]<class U>(U*& p, int64_t count) {
      p = reinterpret_cast<U*>(next);
      next += round_up(count * sizeof(U), 64);
    };
    take(panels, depth * padded);
    take(block, round_up(depth, kDepth) / kDepth * kBlockRows * kPitch);
    take(lines, kLanes * round_up(depth, kLanes));
    take(a_norms, padded);
    take(b_norms, kBlockRows);
    take(best, padded);
    take(index, padded);
    take(tile, kBlockRows * kWidth);
    bytes = next - static_cast<char*>(memory);
  }
};

template <class T, class E>
void pack_panels(const BipartiteMatch& m, const MatchTask& task, const Work<E>& work) {
  const int64_t depth = depth_of<E>(m.width), rows = task.a_end - task.a_begin;
  const int64_t padded = round_up(depth, kLanes);
  for (int64_t first = 0; first < rows; first += kLanes) {
    for (int64_t r = first; r < first + kLanes; ++r) {
      E* line = work.lines + (r - first) * padded;
      std::memset(line, 0, padded * sizeof(E));
      work.best[r] = -__builtin_inff();
      work.index[r] = -1;
      if (r >= rows) continue;
      const T* row = static_cast<const T*>(m.a) + (task.a_begin + r) * m.a_stride;
      convert(row, 0, m.width, line);
      work.a_norms[r] = m.cosine ? inverse_norm(row, m.width) : 1;
    }
    E* to = work.panels + first / kWidth * depth * kWidth + first % kWidth;
    for (int64_t e = 0; e < depth; e += kLanes)
      transpose(work.lines + e, padded, to + e * kWidth, kWidth, depth - e);
  }
}

// Rows first .. first + count - 1 of b, in passes of kDepth elements; zeros fill the last tile.
template <class T, class E>
void pack_block(const BipartiteMatch& m, int64_t first, int64_t count, const Work<E>& work) {
  const int64_t step = kDepth * kPerElement<E>;
  for (int64_t r = 0; r < round_up(count, kMostTileRows); ++r) {
    const T* row = static_cast<const T*>(m.b) + (first + r) * m.b_stride;
    E* to = work.block + r * kPitch;
    for (int64_t d = 0; d < m.width; d += step, to += kBlockRows * kPitch) {
      const int64_t end = d + step < m.width ? d + step : m.width;
      if (r < count) convert(row, d, end, to);
      else std::memset(to, 0, depth_of<E>(end - d) * sizeof(E));
    }
    if (r < count) work.b_norms[r] = m.cosine ? inverse_norm(row, m.width) : 1;
  }
}

// Whether products are faster on the tiles of AMX.
template <class E>
bool on_tiles() {
  return kPerElement<E> == 2 && isa() == Isa::kAmxBf16;
}

// Products of the block's rows with a panel, in one pass: of `rows` rows on tiles, else of
// kTileRows.
template <class E, int kUsed, Into kInto>
void multiply_panel(int64_t rows, int64_t depth, const E* block, const E* lanes, float* c) {
  if (!on_tiles<E>())
    return multiply_tile<E, kUsed, kPitch, 1, kWidth, kWidth, kInto>(depth, block, lanes, c,
                                                                     nullptr);
  constexpr int kFirst = kUsed < 2 ? kUsed : 2, kFrom = kFirst * kLanes;
  multiply<E, kFirst, kPitch, 1, kWidth, kWidth, kInto>(rows, depth, block, lanes, c);
  if constexpr (kUsed > kFirst)
    multiply<E, 1, kPitch, 1, kWidth, kWidth, kInto>(rows, depth, block, lanes + kFrom, c + kFrom);
}

// One panel, of which kUsed vectors hold rows, against the block.
template <class E, int kUsed>
void match_panel(int64_t depth, int64_t panel, int64_t first, int64_t count, const Work<E>& work) {
  const E* lanes = work.panels + panel * depth * kWidth;
  VecF best[kUsed];
  VecI index[kUsed];
  for (int n = 0; n < kUsed; ++n) {
    best[n] = load(work.best + panel * kWidth + n * kLanes);
    std::memcpy(&index[n], work.index + panel * kWidth + n * kLanes, sizeof index[n]);
  }
  const int64_t step = on_tiles<E>() ? kBlockRows : kTileRows;
  for (int64_t row = 0; row < count; row += step) {
    const E* rows = work.block + row * kPitch;
    const int64_t valid = count - row < step ? count - row : step;
    for (int64_t d = 0; d == 0 || d < depth; d += kDepth) {
      const int64_t end = depth - d < kDepth ? depth - d : kDepth;
      const auto product = d == 0 ? multiply_panel<E, kUsed, Into::kOverwrite>
                                  : multiply_panel<E, kUsed, Into::kAdd>;
      product(valid, end, rows + d / kDepth * kBlockRows * kPitch, lanes + d * kWidth, work.tile);
    }
    for (int64_t r = 0; r < valid; ++r) {
      const VecF norm = splat(work.b_norms[row + r]);
      const VecI here = VecI{} + static_cast<int32_t>(first + row + r);
      for (int n = 0; n < kUsed; ++n) {
        const VecF similarity = load(work.tile + r * kWidth + n * kLanes) * norm;
        const VecI better = similarity > best[n];
        best[n] = better ? similarity : best[n];
        index[n] = better ? here : index[n];
      }
    }
  }
  for (int n = 0; n < kUsed; ++n) {
    store(work.best + panel * kWidth + n * kLanes, best[n]);
    std::memcpy(work.index + panel * kWidth + n * kLanes, &index[n], sizeof index[n]);
  }
}

template <class T, class E>
void match(const BipartiteMatch& m, const MatchTask& task, void* scratch) {
  const int64_t rows = task.a_end - task.a_begin, depth = depth_of<E>(m.width);
  const Work<E> work(scratch, m.width, rows);
  const Tiles tiles;
  pack_panels<T>(m, task, work);
  for (int64_t first = task.b_begin; first < task.b_end; first += kBlockRows) {
    const int64_t count = task.b_end - first < kBlockRows ? task.b_end - first : kBlockRows;
    pack_block<T>(m, first, count, work);
    for (int64_t panel = 0; panel * kWidth < rows; ++panel) {
      const int64_t left = rows - panel * kWidth, at = first - task.b_begin;
      if (left > 2 * kLanes) match_panel<E, 3>(depth, panel, at, count, work);
      else if (left > kLanes) match_panel<E, 2>(depth, panel, at, count, work);
      else match_panel<E, 1>(depth, panel, at, count, work);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool found = work.index[r] >= 0;
    static_cast<float*>(m.scores)[task.a_begin + r] =
        found ? work.best[r] * work.a_norms[r] : work.best[r];
    m.index[task.a_begin + r] = found ? task.b_begin + work.index[r] : -1;
  }
}

// Double, for gradcheck: plain.
double dot(const double* x, const double* y, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; ++d) sum += x[d] * y[d];
  return sum;
}
void match_double(const BipartiteMatch& m, const MatchTask& task) {
  const auto inverse = [&](const double* row) {
    const double squares = m.cosine ? dot(row, row, m.width) : 1;
    return squares > 0 ? 1 / std::sqrt(squares) : 0;
  };
  for (int64_t i = task.a_begin; i < task.a_end; ++i) {
    const double* a = static_cast<const double*>(m.a) + i * m.a_stride;
    double best = -__builtin_inf();
    m.index[i] = -1;
    for (int64_t j = task.b_begin; j < task.b_end; ++j) {
      const double* b = static_cast<const double*>(m.b) + j * m.b_stride;
      const double similarity = dot(a, b, m.width) * inverse(b);
      if (similarity > best) {
        best = similarity;
        m.index[i] = j;
      }
    }
    static_cast<double*>(m.scores)[i] = m.index[i] >= 0 ? best * inverse(a) : best;
  }
}

#if defined(__AVX512BF16__)
using Bf16Element = uint32_t;
#else
using Bf16Element = float;
#endif

}  // namespace

int64_t match_scratch(const BipartiteMatch& m, int64_t task_rows) {
  if (m.dtype == ScalarType::Double) return 0;
  return Work<float>(nullptr, m.width, task_rows).bytes;  // pairs take half of it
}

void match_rows(const BipartiteMatch& m, const MatchTask& task, void* scratch) {
  switch (m.dtype) {
    case ScalarType::Float:
      return match<float, float>(m, task, scratch);
    case ScalarType::BFloat16:
      return match<BFloat16, Bf16Element>(m, task, scratch);
    case ScalarType::Half:
      return match<Half, float>(m, task, scratch);
    default:
      return match_double(m, task);
  }
}

}  // namespace MOR_ISA
}  // namespace mor
