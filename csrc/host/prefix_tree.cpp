#include "prefix_tree.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace mor::host {
namespace {

// The finaliser of splitmix64.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

PrefixTree::PrefixTree(BlockPool& pool, int32_t block_size, std::vector<int32_t> group_tokens,
                       int hash_bits)
    : pool_(pool),
      block_size_(block_size),
      group_tokens_(std::move(group_tokens)),
      mask_(hash_bits >= 64 ? ~0ULL : (1ULL << hash_bits) - 1) {}

bool PrefixTree::alive(NodeHandle node) const {
  return node.index < 0 || nodes_[node.index].serial == node.serial;
}

uint64_t PrefixTree::hash(NodeHandle parent, const PrefixSalt& salt,
                          std::span<const int32_t> tokens) const {
  uint64_t h = parent.index >= 0
                   ? nodes_[parent.index].hash
                   : mix(salt.tenant ^ mix(std::bit_cast<uint64_t>(salt.threshold) ^
                                           mix(static_cast<uint64_t>(salt.max_recursions))));
  for (const int32_t token : tokens) h = mix(h ^ static_cast<uint32_t>(token));
  return h & mask_;
}

NodeHandle PrefixTree::child(NodeHandle parent, const PrefixSalt& salt,
                             std::span<const int32_t> tokens) const {
  const auto [begin, end] = by_hash_.equal_range(hash(parent, salt, tokens));
  for (auto it = begin; it != end; ++it) {
    const PrefixNode& node = nodes_[it->second];
    if (node.parent == parent.index && node.salt == salt &&
        std::equal(tokens.begin(), tokens.end(), node.tokens.begin(), node.tokens.end())) {
      return {it->second, node.serial};
    }
  }
  return {};
}

NodeHandle PrefixTree::longest(const PrefixSalt& salt, std::span<const int32_t> tokens,
                               int32_t limit) const {
  NodeHandle found;
  for (int32_t end = block_size_; end <= limit; end += block_size_) {
    const NodeHandle next = child(found, salt, tokens.subspan(end - block_size_, block_size_));
    if (next.index < 0) break;
    found = next;
  }
  return found;
}

std::vector<std::vector<int32_t>> PrefixTree::tables(NodeHandle handle) const {
  std::vector<std::vector<int32_t>> tables(group_tokens_.size());
  std::vector<int32_t> path;
  for (int32_t at = handle.index; at >= 0; at = nodes_[at].parent) path.push_back(at);
  for (auto at = path.rbegin(); at != path.rend(); ++at) {
    const PrefixNode& node = nodes_[*at];
    for (size_t g = 0; g < group_tokens_.size(); ++g) {
      if (group_tokens_[g] == 0) continue;
      // The last block of the parent is replaced where this node goes on in the middle of it.
      const int32_t before = node.parent < 0 ? 0 : nodes_[node.parent].counts[g];
      tables[g].resize(before / group_tokens_[g]);
      tables[g].insert(tables[g].end(), node.blocks[g].begin(), node.blocks[g].end());
    }
  }
  const PrefixNode& last = nodes_[handle.index];
  for (size_t g = 0; g < group_tokens_.size(); ++g) {
    if (group_tokens_[g] == 0) continue;
    const size_t size = (last.counts[g] + group_tokens_[g] - 1) / group_tokens_[g];
    if (tables[g].size() != size) throw std::logic_error("prefix tree: a path has a hole");
  }
  return tables;
}

std::vector<uint8_t> PrefixTree::depths(NodeHandle handle) const {
  std::vector<uint8_t> depths(static_cast<size_t>(nodes_[handle.index].depth) * block_size_);
  for (int32_t at = handle.index; at >= 0; at = nodes_[at].parent) {
    const PrefixNode& node = nodes_[at];
    std::copy(node.depths.begin(), node.depths.end(),
              depths.begin() + static_cast<int64_t>(node.depth - 1) * block_size_);
  }
  return depths;
}

NodeHandle PrefixTree::insert(NodeHandle parent, const PrefixSalt& salt,
                              std::span<const int32_t> tokens, std::span<const uint8_t> depths,
                              const std::vector<int32_t>& counts, const BlockTables& tables) {
  int32_t index = static_cast<int32_t>(nodes_.size());
  if (unused_.empty()) {
    nodes_.emplace_back();
  } else {
    index = unused_.back();
    unused_.pop_back();
  }
  PrefixNode& node = nodes_[index];
  node = PrefixNode{};
  node.serial = next_serial_++;
  node.hash = hash(parent, salt, tokens);
  node.parent = parent.index;
  node.depth = parent.index < 0 ? 1 : nodes_[parent.index].depth + 1;
  node.salt = salt;
  node.tokens.assign(tokens.begin(), tokens.end());
  node.depths.assign(depths.begin(), depths.end());
  node.counts = counts;
  node.blocks.resize(group_tokens_.size());
  for (size_t g = 0; g < group_tokens_.size(); ++g) {
    if (group_tokens_[g] == 0) continue;
    const int32_t before = parent.index < 0 ? 0 : nodes_[parent.index].counts[g];
    const int32_t end = (counts[g] + group_tokens_[g] - 1) / group_tokens_[g];
    for (int32_t place = before / group_tokens_[g]; place < end; ++place) {
      const int32_t block = tables[static_cast<int32_t>(g)][place];
      node.blocks[g].push_back(block);
      pool_.add_node(block, index, node.depth);
    }
  }
  if (parent.index >= 0) {
    PrefixNode& above = nodes_[parent.index];
    node.previous = above.last_child;
    (above.last_child < 0 ? above.first_child : nodes_[above.last_child].next) = index;
    above.last_child = index;
  }
  by_hash_.emplace(node.hash, index);
  return {index, node.serial};
}

void PrefixTree::remove_leaf(int32_t index) {
  PrefixNode& node = nodes_[index];
  for (const auto& blocks : node.blocks) {
    for (const int32_t block : blocks) pool_.remove_node(block, index);
  }
  if (node.parent >= 0) {
    PrefixNode& above = nodes_[node.parent];
    (node.previous < 0 ? above.first_child : nodes_[node.previous].next) = node.next;
    (node.next < 0 ? above.last_child : nodes_[node.next].previous) = node.previous;
  }
  const auto [begin, end] = by_hash_.equal_range(node.hash);
  by_hash_.erase(
      std::find_if(begin, end, [&](const auto& entry) { return entry.second == index; }));
  node.serial = 0;
  unused_.push_back(index);
}

void PrefixTree::remove(int32_t index) {
  // Descendants before their ancestors, without recursion: a path is as long as a context.
  for (int32_t at = index;;) {
    while (nodes_[at].first_child >= 0) at = nodes_[at].first_child;
    const int32_t parent = nodes_[at].parent;
    remove_leaf(at);
    if (at == index) return;
    at = parent;
  }
}

int32_t PrefixTree::allocate() {
  // Removing nodes moves blocks that cache nothing any more to the front.
  const int32_t block = pool_.front();
  while (!pool_.nodes(block).empty()) remove(pool_.nodes(block).front());
  return pool_.take();
}

void PrefixTree::check() const {
  const auto demand = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("prefix tree: ") + what);
  };
  size_t alive = 0, named = 0, naming = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const PrefixNode& node = nodes_[i];
    if (node.serial == 0) continue;
    ++alive;
    demand(node.parent < 0 || nodes_[node.parent].serial != 0, "a node has no parent");
    for (const auto& blocks : node.blocks) {
      for (const int32_t block : blocks) {
        const auto& nodes = pool_.nodes(block);
        demand(std::count(nodes.begin(), nodes.end(), static_cast<int32_t>(i)) == 1,
               "a node names a block that was reused");
        ++named;
      }
    }
  }
  for (int32_t block = 0; block < pool_.num_blocks(); ++block) naming += pool_.nodes(block).size();
  demand(named == naming, "a block names a node that was removed");
  demand(alive == by_hash_.size(), "a node is missing in the hash map");
}

}  // namespace mor::host
