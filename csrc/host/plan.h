// What the engine does next: one pass over packed rows, as flat arrays.
//   A row is a token in flight, and lies in slot slots[i] of the engine's pool of states. An entry
//   is one sequence in this pass, with its rows side by side in order of position; entry b has
//   rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1 and row b of block_table. The three passes:
//   enter  embed tokens, write slots of the state pool, run the first layer (group E), ask the
//          router of recursion 1 (expert) or for the depth (token).
//   block  run the shared block on the rows' states: row i takes recursion recursions[i], with
//          the keys of its group, and then the router of recursion recursions[i] + 1. Rows are
//          sorted by recursion: those of r are recursion_offsets[r - 1] .. recursion_offsets[r] - 1.
//   exit   run the last layer (group E). All rows append keys and values; only the first
//          num_logit_rows attend, have entries, and go through the MLP and the head. Sample one
//          token for each of sample_rows.
//   Before each pass: copy blocks copy_sources[i] to copy_destinations[i] (read all, then write:
//   a destination may be a source of another copy); then contents of fresh_blocks are undefined.
//   positions [N], tokens [N] (enter), slot_mapping [N] (place in the row's group; negative: no
//   append), write_through [R - 1, N] (hybrid: the same for groups 2 .. R, of rows at recursion 1),
//   context_lens [N] (exit: [num_logit_rows]), context_starts as that with a window, thresholds [N].
#pragma once

#include <cstdint>
#include <vector>

namespace mor::host {

struct Plan {
  enum class Kind { kIdle, kEnter, kBlock, kExit };

  Kind kind = Kind::kIdle;
  std::vector<int64_t> ids;  // [B] sequence of each entry
  std::vector<int64_t> slots, positions, tokens, slot_mapping, write_through;
  std::vector<int32_t> recursions;  // exit: the depths that the rows took
  std::vector<int32_t> recursion_offsets;
  std::vector<float> thresholds;
  std::vector<int32_t> cu_seqlens = {0};
  std::vector<int32_t> block_table;  // [B, max_blocks], -1 after the blocks of an entry
  int32_t max_blocks = 0;
  std::vector<int32_t> context_lens, context_starts;
  int32_t num_logit_rows = 0;
  std::vector<int64_t> sample_rows, sample_ids;
  std::vector<int64_t> copy_sources, copy_destinations, fresh_blocks;
  double expected_seconds = 0;

  int32_t num_rows() const { return static_cast<int32_t>(slots.size()); }
  int32_t num_entries() const { return static_cast<int32_t>(ids.size()); }
};

}  // namespace mor::host
