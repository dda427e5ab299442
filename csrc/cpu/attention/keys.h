// Where the keys of a task are. Included by the kernels of csrc/cpu/attention only.
//
// decode.h and tiles.h read keys from a source: ListedKeys, rows of packed sequences, or PagedKeys,
// blocks of caches (paged_keys.h). A source numbers its keys, from `begin` to `end`, and has
//   find_offsets(first, count, offsets)  where some of them are, at most kBlockKeys
//   k(), v()                             the operands: data and head_stride
//   limits                               which of them each row of the task sees
//   fill_block(first, count)             makes `bias` and `depths` those of some of them
//   bias, depths                         what their scores add, times log2(e), and how deep they
//                                        are; null: nothing, and nothing is hidden by depth
#pragma once

#include "csrc/cpu/attention/visibility.h"

namespace mor {
namespace MOR_ISA {

constexpr float kLog2e = 1.44269504f;

// Element offsets of some keys in each operand, of head 0.
struct KeyOffsets {
  int64_t k[kBlockKeys], v[kBlockKeys];

  // Past the end stand those of the last key, for who reads whole vectors of keys or fetches ahead.
  void repeat_last(int64_t count) {
    for (int64_t j = count; j < max(kDecodeKeys, round_up(count, kLanes)); ++j)
      k[j] = k[count - 1], v[j] = v[count - 1];
  }
};

// Where the rows of some keys are, of one head. K: what k is read as.
template <class K, class V>
struct KeyPointers {
  const K* k[kBlockKeys];
  const V* v[kBlockKeys];
};

template <class Keys, class K, class T>
void find_pointers(const Keys& keys, const KeyOffsets& offsets, int64_t count, int64_t head,
                   KeyPointers<K, T>& to) {
  const T* k = static_cast<const T*>(keys.k().data) + head * keys.k().head_stride;
  const T* v = static_cast<const T*>(keys.v().data) + head * keys.v().head_stride;
  for (int64_t j = 0; j < round_up(count, kLanes); ++j) {
    to.k[j] = reinterpret_cast<const K*>(k + offsets.k[j]);
    to.v[j] = v + offsets.v[j];
  }
}

struct ListedKeys {
  const AttentionProblem& p;
  RowLimits limits;
  float* bias;
  int32_t *list, *block_depths;
  KeyList keys{};
  const int32_t* depths = nullptr;
  int64_t begin = 0, end = 0;

  ListedKeys(const AttentionProblem& problem, int64_t sequence, int64_t rows, Arena& arena)
      : p(problem), limits(take_limits(arena, p.window != 0, round_up(rows, kWidth))) {
    bias = p.key_bias ? arena.take<float>(kBlockKeys) : nullptr;
    list = arena.take<int32_t>(p.q_depths ? p.cu_k[sequence + 1] - p.cu_k[sequence] : 0);
    block_depths = arena.take<int32_t>(p.q_depths ? kBlockKeys : 0);
  }

  // Makes them the keys of a task of the sequence.
  void list_for(const AttentionTask& task) {
    keys = list_keys(p, task, list);
    end = keys.count;
    depths = keys.mask_depths ? block_depths : nullptr;
    fill_limits(p, task, keys, limits);
  }

  const AttentionOperand& k() const { return p.k; }
  const AttentionOperand& v() const { return p.v; }
  int64_t row(int64_t key) const { return keys.row(key); }

  void find_offsets(int64_t first, int64_t count, KeyOffsets& offsets) const {
    for (int64_t j = 0; j < count; ++j) {
      offsets.k[j] = row(first + j) * p.k.row_stride;
      offsets.v[j] = row(first + j) * p.v.row_stride;
    }
    offsets.repeat_last(count);
  }

  void fill_block(int64_t first, int64_t count) {
    for (int64_t j = 0; (bias || depths) && j < count; ++j) {
      const int64_t at = row(first + j);
      if (bias) bias[j] = static_cast<const float*>(p.key_bias)[at] * kLog2e;
      if (depths) block_depths[j] = p.k_depths[at];
    }
  }
};

}  // namespace MOR_ISA
}  // namespace mor
