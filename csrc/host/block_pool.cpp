#include "block_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace mor::host {

BlockPool::BlockPool(int32_t num_blocks) : blocks_(num_blocks + 1), num_free_(num_blocks) {
  for (int32_t block = 0; block <= num_blocks; ++block) {
    blocks_[block].previous = block == 0 ? num_blocks : block - 1;
    blocks_[block].next = block == num_blocks ? 0 : block + 1;
  }
}

void BlockPool::link_after(int32_t block, int32_t place) {
  const int32_t next = blocks_[place].next;
  blocks_[block].previous = place;
  blocks_[block].next = next;
  blocks_[place].next = blocks_[next].previous = block;
  ++num_free_;
}

void BlockPool::unlink(int32_t block) {
  blocks_[blocks_[block].previous].next = blocks_[block].next;
  blocks_[blocks_[block].next].previous = blocks_[block].previous;
  --num_free_;
}

int32_t BlockPool::front() const {
  if (num_free_ == 0) throw std::logic_error("block pool: no free block");
  return blocks_[num_blocks()].next;
}

int32_t BlockPool::take() {
  const int32_t block = front();
  if (!blocks_[block].nodes.empty()) throw std::logic_error("block pool: took a cached block");
  unlink(block);
  blocks_[block].references = 1;
  return block;
}

void BlockPool::add_reference(int32_t block) {
  if (blocks_[block].references++ > 0) return;
  unlink(block);
  if (!blocks_[block].nodes.empty()) --num_cached_;
}

void BlockPool::release(int32_t block) {
  if (blocks_[block].references <= 0) throw std::logic_error("block pool: freed a free block");
  if (--blocks_[block].references > 0) return;
  const bool cached = !blocks_[block].nodes.empty();
  link_after(block, cached ? blocks_[num_blocks()].previous : num_blocks());
  num_cached_ += cached;
}

void BlockPool::add_node(int32_t block, int32_t node, int32_t depth) {
  Block& b = blocks_[block];
  if (b.references == 0) throw std::logic_error("block pool: a node names a free block");
  if (b.nodes.empty()) b.depth = depth;
  b.nodes.push_back(node);
}

void BlockPool::remove_node(int32_t block, int32_t node) {
  Block& b = blocks_[block];
  b.nodes.erase(std::find(b.nodes.begin(), b.nodes.end(), node));
  if (!b.nodes.empty()) return;
  b.depth = 0;
  if (b.references > 0) return;
  --num_cached_;
  unlink(block);
  link_after(block, num_blocks());
}

void BlockPool::check() const {
  const auto demand = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("block pool: ") + what);
  };
  const int32_t end = num_blocks();
  int32_t free = 0, cached = 0, unreferenced = 0;
  for (int32_t block = blocks_[end].next; block != end; block = blocks_[block].next) {
    demand(++free <= end, "the free list has a cycle");
    demand(blocks_[block].references == 0, "a block in use is in the free list");
    demand(blocks_[blocks_[block].next].previous == block, "the free list is broken");
    cached += !blocks_[block].nodes.empty();
  }
  for (int32_t block = 0; block < end; ++block) {
    demand(blocks_[block].references >= 0, "a count of references is negative");
    unreferenced += blocks_[block].references == 0;
  }
  demand(free == num_free_ && free == unreferenced, "a block is neither free nor in use");
  demand(cached == num_cached_, "the count of cached blocks is wrong");
}

int32_t BlockTables::num_blocks() const {
  int32_t total = 0;
  for (const auto& table : tables_) total += static_cast<int32_t>(table.size());
  return total;
}

void BlockTables::share(int32_t group, int32_t block) {
  pool_->add_reference(block);
  tables_[group].push_back(block);
}

void BlockTables::clear() {
  std::vector<int32_t> all;
  all.reserve(num_blocks());
  for (auto& table : tables_) {
    all.insert(all.end(), table.rbegin(), table.rend());
    table.clear();
  }
  std::stable_sort(all.begin(), all.end(),
                   [&](int32_t a, int32_t b) { return pool_->depth(a) > pool_->depth(b); });
  for (const int32_t block : all) pool_->release(block);
}

}  // namespace mor::host
