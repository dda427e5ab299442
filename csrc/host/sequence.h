// One sequence of tokens between its request and its end.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "block_pool.h"
#include "options.h"
#include "prefix_tree.h"

namespace mor::host {

// kWaiting has no blocks. Otherwise the sequence runs: it has tokens to embed (kEnter), or a chunk
// in flight of which rows take another recursion (kBlock) or all wait for the last layer (kExit).
enum class State { kWaiting, kEnter, kBlock, kExit };

// The tokens that are in flight together: one item that shrinks as it deepens.
struct Chunk {
  int32_t length = 0;            // positions done .. done + length - 1 of the sequence
  bool prompt = false;           // counts against the budget of prompt rows
  int32_t recursion = 0;         // what the active rows take next
  std::vector<int32_t> slots;    // of the state pool, by row of the chunk
  std::vector<uint8_t> depths;   // recursions taken, by row of the chunk
  std::vector<uint8_t> targets;  // token-choice: recursions to take
  std::vector<int32_t> active;   // rows of the chunk that take another recursion, ascending
  int32_t waited = 0;            // block passes since its last row left
};

struct Sequence {
  Sequence(int64_t id, Request request, double arrival, BlockPool& pool, int32_t num_groups)
      : id(id),
        request(std::move(request)),
        arrival(arrival),
        counts(num_groups),
        places(num_groups),
        tables(pool, num_groups) {
    prompt_length = static_cast<int32_t>(this->request.tokens.size());
    salt = {this->request.tenant, this->request.threshold, this->request.max_recursions};
  }

  int32_t length() const { return static_cast<int32_t>(request.tokens.size()); }
  int32_t remaining() const { return length() - done; }  // tokens that have not run the last layer
  int32_t generated() const { return length() - prompt_length; }

  const int64_t id;
  Request request;  // its tokens grow by those that were sampled
  const double arrival;
  PrefixSalt salt;
  int32_t prompt_length;
  State state = State::kWaiting;
  bool aborted = false;                      // as soon as the pass in flight is reported
  int32_t done = 0;                          // positions that have run the last layer
  std::vector<uint8_t> depths;               // of those positions
  std::vector<int32_t> counts;               // tokens appended to each group
  std::vector<std::vector<int32_t>> places;  // with a window: position of each slot of a group
  BlockTables tables;
  std::vector<int32_t> fork_blocks;  // reserved for the tails of its n - 1 children
  Chunk chunk;
  NodeHandle node;  // the prefix that the tree has, node_end tokens long
  int32_t node_end = 0;
  bool cacheable = true;  // false: the tree has other depths for its prefix
};

}  // namespace mor::host
