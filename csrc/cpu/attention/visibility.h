// Which keys the rows of attention's tasks see. Included by the kernels of csrc/cpu/attention only.
#pragma once

#include "csrc/cpu/attention/depth_attention.simd.h"
#include "csrc/cpu/simd/vec.h"

namespace mor {
namespace MOR_ISA {

constexpr int kVectors = 2;
constexpr int kWidth = kVectors * kLanes;  // lanes of a group
constexpr int kBlockKeys = 128;
constexpr int kDecodeKeys = 64;  // of a block in decoding, which prefetches the next one

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Hands out 64-byte aligned pieces of one allocation; with a null base only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// Which keys of its sequence a task reads: rows begin + i, or (depths) rows list[i], those whose
// depth some query reaches, from the first to the last that a position allows.
struct KeyList {
  int64_t begin, count;
  int32_t* list;
  bool mask_depths;  // some listed key is still hidden from some query

  int64_t row(int64_t i) const { return list ? list[i] : begin + i; }
};

// The first i in [from, count) that is not passed; what is passed comes first. The nearer, the
// faster.
template <class Passed>
inline int64_t first_not(int64_t from, int64_t count, Passed&& passed) {
  int64_t low = from, high = low;
  for (int64_t step = 1; high < count && passed(high); step *= 2) low = high + 1, high += step;
  high = min(high, count);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (passed(middle)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The first i in [from, count) whose position exceeds `position`. `from` is 0, or the answer for a
// position not after it.
inline int64_t visible_keys(const AttentionProblem& p, const KeyList& keys, int64_t position,
                            int64_t from = 0) {
  if (!p.causal) return keys.count;
  return first_not(from, keys.count,
                   [&](int64_t i) { return p.k_positions[keys.row(i)] <= position; });
}

// The first i in [from, count) that the window lets a query at `position` see. Keys up to `count`
// are not after the query: unsigned differences cannot overflow.
inline int64_t passed_keys(const AttentionProblem& p, const KeyList& keys, int64_t position,
                           int64_t count, int64_t from = 0) {
  return first_not(from, count, [&](int64_t i) {
    const uint64_t key = static_cast<uint64_t>(p.k_positions[keys.row(i)]);
    return static_cast<uint64_t>(position) - key >= static_cast<uint64_t>(p.window);
  });
}

// The row's query and head.
struct RowIndex {
  int64_t query, head;
};
inline RowIndex row_index(const AttentionProblem& p, const AttentionTask& task, int64_t row) {
  return {p.cu_q[task.sequence] + row / p.group, task.kv_head * p.group + row % p.group};
}

inline KeyList list_keys(const AttentionProblem& p, const AttentionTask& task, int32_t* list) {
  KeyList keys{p.cu_k[task.sequence], 0, nullptr, false};
  keys.count = p.cu_k[task.sequence + 1] - keys.begin;
  const int64_t first_query = row_index(p, task, task.row_begin).query;
  const int64_t last_query = row_index(p, task, task.row_end - 1).query;
  keys.count = visible_keys(p, keys, p.q_positions[last_query]);
  if (p.window != 0) {
    const int64_t position = p.q_positions[first_query];
    const int64_t passed = passed_keys(p, keys, position, visible_keys(p, keys, position));
    keys.begin += passed, keys.count -= passed;
  }
  if (!p.q_depths) return keys;
  int32_t least = p.q_depths[first_query], most = least;
  for (int64_t i = first_query; i <= last_query; ++i) {
    least = p.q_depths[i] < least ? p.q_depths[i] : least;
    most = p.q_depths[i] > most ? p.q_depths[i] : most;
  }
  int64_t count = 0;
  int32_t shallowest = most;
  for (int64_t j = keys.begin; j < keys.begin + keys.count; ++j) {
    list[count] = static_cast<int32_t>(j);
    if (p.k_depths[j] >= least) {
      ++count;
      shallowest = p.k_depths[j] < shallowest ? p.k_depths[j] : shallowest;
    }
  }
  return {keys.begin, count, list, shallowest < most};
}

// What lanes may see: keys by position, from `first` (null: all) up to `limit`, and the depth of the
// query of each.
struct RowLimits {
  int32_t *first, *limit, *depth;  // [lanes]

  RowLimits from(int64_t lane) const {
    return {first ? first + lane : nullptr, limit + lane, depth + lane};
  }
};

inline RowLimits take_limits(Arena& arena, bool with_first, int64_t lanes) {
  int32_t* first = with_first ? arena.take<int32_t>(lanes) : nullptr;
  int32_t* limit = arena.take<int32_t>(lanes);
  return {first, limit, arena.take<int32_t>(lanes)};
}

inline void fill_limits(const AttentionProblem& p, const AttentionTask& task, const KeyList& keys,
                        const RowLimits& all) {
  const int64_t rows = task.row_end - task.row_begin;
  int64_t first = 0, limit = 0;
  for (int64_t row = 0; row < round_up(rows, kWidth); ++row) {
    const int64_t query = row_index(p, task, task.row_begin + min(row, rows - 1)).query;
    if (row == 0 || (row < rows && (task.row_begin + row) % p.group == 0)) {
      limit = visible_keys(p, keys, p.q_positions[query], limit);
      if (all.first) first = passed_keys(p, keys, p.q_positions[query], limit, first);
    }
    all.limit[row] = static_cast<int32_t>(limit);
    if (all.first) all.first[row] = static_cast<int32_t>(first);
    all.depth[row] = p.q_depths ? p.q_depths[query] : 0;
  }
}

// Which of a vector of rows see key `j` of the list.
inline VecI visible_rows(const RowLimits& rows, int lane, int64_t j, const int32_t* key_depth) {
  VecI first, limit, depth;
  std::memcpy(&limit, rows.limit + lane, sizeof limit);
  VecI visible = VecI{} + static_cast<int32_t>(j) < limit;
  if (rows.first) {
    std::memcpy(&first, rows.first + lane, sizeof first);
    visible &= VecI{} + static_cast<int32_t>(j) >= first;
  }
  if (key_depth) {
    std::memcpy(&depth, rows.depth + lane, sizeof depth);
    visible &= VecI{} + *key_depth >= depth;
  }
  return visible;
}

// The groups of a task's lanes that see, by position, any of the keys first .. first + count - 1 of
// the list; positions do not fall from lane to lane.
struct LaneRange {
  int64_t begin, end;
};
inline LaneRange lanes_that_see(const RowLimits& all, int64_t lanes, int64_t first, int64_t count) {
  LaneRange range{0, lanes};
  while (range.begin < range.end && all.limit[range.begin + kWidth - 1] <= first)
    range.begin += kWidth;
  while (all.first && range.begin < range.end && all.first[range.end - kWidth] >= first + count)
    range.end -= kWidth;
  return range;
}

// Whether every row of a group sees, by position, all of the keys first .. first + count - 1.
inline bool all_see(const RowLimits& group, int64_t first, int64_t count) {
  return group.limit[0] >= first + count && (!group.first || group.first[kWidth - 1] <= first);
}

}  // namespace MOR_ISA
}  // namespace mor
