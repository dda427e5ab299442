// Blocks of the key/value cache: who holds them, which are free, which still cache a prefix.
//   A block is a number in [0, num_blocks). It is in use (references > 0) or in the free list. A
//   free block that nodes of the prefix tree name is cached: its contents are valid, and it can be
//   used again by a prefix hit or evicted.
//   The free list is an intrusive doubly linked list in order of reuse. The front is taken first.
//   A block without contents of value goes to the front, a cached one to the back, so that the
//   front cached block is the least recently used. Every operation but `check` is O(1), apart from
//   the few nodes that name one block.
//   The pool knows no bytes: a block of group g holds group_tokens[g] tokens, and the same bytes
//   serve every group.
#pragma once

#include <cstdint>
#include <vector>

namespace mor::host {

class BlockPool {
 public:
  explicit BlockPool(int32_t num_blocks);

  int32_t num_blocks() const { return static_cast<int32_t>(blocks_.size()) - 1; }
  int32_t num_free() const { return num_free_; }      // cached ones among them
  int32_t num_cached() const { return num_cached_; }  // free, and named by a node
  int32_t references(int32_t block) const { return blocks_[block].references; }
  const std::vector<int32_t>& nodes(int32_t block) const { return blocks_[block].nodes; }
  // Depth in the tree of the first node that named the block; 0: no node names it.
  int32_t depth(int32_t block) const { return blocks_[block].depth; }

  // The block that is reused next. There must be a free one.
  int32_t front() const;
  // Takes the front block, which no node may name; it has one reference.
  int32_t take();
  void add_reference(int32_t block);
  void release(int32_t block);

  void add_node(int32_t block, int32_t node, int32_t depth);
  void remove_node(int32_t block, int32_t node);

  // Throws std::logic_error unless the list, the counts and the references agree.
  void check() const;

 private:
  struct Block {
    int32_t previous = -1;
    int32_t next = -1;
    int32_t references = 0;
    int32_t depth = 0;
    std::vector<int32_t> nodes;
  };

  void link_after(int32_t block, int32_t place);
  void unlink(int32_t block);

  std::vector<Block> blocks_;  // the last one is the ends of the list
  int32_t num_free_;
  int32_t num_cached_ = 0;
};

// The block tables of one sequence, one a group; they hold a reference to each of their blocks.
class BlockTables {
 public:
  BlockTables(BlockPool& pool, int32_t num_groups) : pool_(&pool), tables_(num_groups) {}
  BlockTables(const BlockTables&) = delete;
  BlockTables& operator=(const BlockTables&) = delete;
  ~BlockTables() { clear(); }

  const std::vector<int32_t>& operator[](int32_t group) const { return tables_[group]; }
  int32_t num_blocks() const;
  // Appends a block whose reference passes to the table.
  void adopt(int32_t group, int32_t block) { tables_[group].push_back(block); }
  // Appends a block that others hold or that is cached.
  void share(int32_t group, int32_t block);
  // Releases all blocks: those deepest in the tree first, so that prefixes stay cached longest.
  void clear();

 private:
  BlockPool* pool_;
  std::vector<std::vector<int32_t>> tables_;
};

}  // namespace mor::host
