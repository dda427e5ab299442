// Prefix tree: which blocks hold the keys and values of a prefix that was computed before.
//   A node stands for block_size tokens after its parent's. It stores those tokens, the depth that
//   each took, the number of tokens n_g of each group at its end, and for each group g the blocks
//   of the table places floor(n_g(parent) / t_g) .. ceil(n_g / t_g) - 1, t_g tokens a block. So a
//   node may end, and begin, in the middle of a block, and several nodes may name one block.
//   Look-up is by a hash chained over the path and seeded by the salt, and then by comparison of
//   parent, salt and tokens: a collision costs time, never a wrong answer.
//   A node names blocks and holds no reference to them. Evicting a block removes every node that
//   names it, with its descendants, whose prefix would have a hole: `allocate` does so.
//   A handle outlives its node: `alive` tells.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "block_pool.h"

namespace mor::host {

// Sequences share a prefix only if all of this is equal: it decides what is computed from tokens.
struct PrefixSalt {
  uint64_t tenant = 0;
  double threshold = 0;
  int32_t max_recursions = 0;
  bool operator==(const PrefixSalt&) const = default;
};

struct NodeHandle {
  int32_t index = -1;  // -1: the root
  uint64_t serial = 0;
};

struct PrefixNode {
  uint64_t serial = 0;  // 0: not in use
  uint64_t hash = 0;
  int32_t parent = -1, first_child = -1, last_child = -1, previous = -1, next = -1;
  int32_t depth = 0;  // 1 below the root
  PrefixSalt salt;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> depths;
  std::vector<int32_t> counts;
  std::vector<std::vector<int32_t>> blocks;
};

class PrefixTree {
 public:
  // hash_bits: fewer than 64 make collisions, for tests.
  PrefixTree(BlockPool& pool, int32_t block_size, std::vector<int32_t> group_tokens, int hash_bits);

  bool alive(NodeHandle node) const;
  const PrefixNode& node(NodeHandle node) const { return nodes_[node.index]; }
  size_t num_nodes() const { return by_hash_.size(); }

  // The child of `parent` with these block_size tokens; index -1 if there is none.
  NodeHandle child(NodeHandle parent, const PrefixSalt& salt,
                   std::span<const int32_t> tokens) const;
  // The deepest node whose prefix has at most `limit` of the tokens; index -1 if there is none.
  NodeHandle longest(const PrefixSalt& salt, std::span<const int32_t> tokens, int32_t limit) const;
  // The block tables of the prefix that ends at a node, one a group.
  std::vector<std::vector<int32_t>> tables(NodeHandle node) const;
  // The depths of all tokens of that prefix.
  std::vector<uint8_t> depths(NodeHandle node) const;
  // Adds a child that does not exist yet, of a sequence with these counts and tables.
  NodeHandle insert(NodeHandle parent, const PrefixSalt& salt, std::span<const int32_t> tokens,
                    std::span<const uint8_t> depths, const std::vector<int32_t>& counts,
                    const BlockTables& tables);

  // Takes the block that is reused next; what it cached is forgotten.
  int32_t allocate();
  // Throws std::logic_error unless nodes and blocks name each other.
  void check() const;

 private:
  uint64_t hash(NodeHandle parent, const PrefixSalt& salt, std::span<const int32_t> tokens) const;
  void remove(int32_t index);
  void remove_leaf(int32_t index);

  BlockPool& pool_;
  const int32_t block_size_;
  const std::vector<int32_t> group_tokens_;
  const uint64_t mask_;
  std::vector<PrefixNode> nodes_;
  std::vector<int32_t> unused_;
  std::unordered_multimap<uint64_t, int32_t> by_hash_;
  uint64_t next_serial_ = 1;
};

}  // namespace mor::host
