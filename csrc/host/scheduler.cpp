// Sequences from their request to their end: what is added, reported, forked and freed.
#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace mor::host {
namespace {

constexpr double kLeastRatio = 0.1;   // of growth, or less if it starts there: admission.cpp
constexpr double kRatioDecay = 0.99;  // for each exit pass
constexpr int64_t kMostRecentExits = 1 << 16;  // then the histogram is halved

void expect_size(const char* name, size_t expected, size_t got) {
  if (expected == got) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(expected) +
                              " elements, got " + std::to_string(got));
}

Options checked(Options options) {
  options.check();
  return options;
}

}  // namespace

Scheduler::Scheduler(Options options)
    : options_(checked(std::move(options))),
      group_tokens_(options_.group_tokens()),
      pool_(options_.num_blocks),
      tree_(pool_, options_.block_size, group_tokens_, options_.hash_bits),
      recent_(options_.num_recursions + 1) {
  for (int32_t i = options_.max_rows + options_.chunk; i-- > 0;) free_slots_.push_back(i);
  stats_.blocks = options_.num_blocks;
  stats_.exit_depths.resize(options_.num_recursions + 1);
  stats_.growth_ratio = options_.growth_ratio;
}

int64_t Scheduler::add(Request request, double now) {
  request.check(options_);
  if (!(now >= time_)) {
    throw std::invalid_argument("now: expected a time of at least " + std::to_string(time_) +
                                ", got " + std::to_string(now));
  }
  time_ = now;
  const int64_t id = next_id_;
  next_id_ += request.n;
  auto s =
      std::make_unique<Sequence>(id, std::move(request), now, pool_, options_.num_recursions + 1);
  waiting_[s->request.priority].insert(id);
  if (s->request.deadline < std::numeric_limits<double>::infinity())
    deadlines_.emplace(s->request.deadline, id);
  sequences_.emplace(id, std::move(s));
  return id;
}

bool Scheduler::abort(int64_t id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end() || found->second->aborted) return false;
  Sequence& s = *found->second;
  if (in_flight_ && std::find(pass_.begin(), pass_.end(), &s) != pass_.end()) {
    s.aborted = true;
  } else {
    finish(s, "abort");
  }
  return true;
}

void Scheduler::release_chunk(Sequence& s) {
  if (s.chunk.prompt) prompt_rows_ -= s.chunk.length;
  free_slots_.insert(free_slots_.end(), s.chunk.slots.begin(), s.chunk.slots.end());
  s.chunk = Chunk{};
}

void Scheduler::drop(Sequence& s) {
  release_chunk(s);
  for (const int32_t block : s.fork_blocks) pool_.release(block);
  s.fork_blocks.clear();
  std::erase_if(copies_, [&](const Copy& copy) { return copy.id == s.id; });
}

void Scheduler::finish(Sequence& s, const char* reason) {
  for (int32_t k = 0; k < s.request.n; ++k) finished_.emplace_back(s.id + k, reason);
  drop(s);
  if (s.state == State::kWaiting) {
    const auto ids = waiting_.find(s.request.priority);
    ids->second.erase(s.id);
    if (ids->second.empty()) waiting_.erase(ids);
  } else {
    running_.erase(std::find(running_.begin(), running_.end(), &s));
  }
  deadlines_.erase({s.request.deadline, s.id});
  sequences_.erase(s.id);
}

const Plan& Scheduler::pass() const {
  if (!in_flight_)
    throw std::invalid_argument("report: expected a pass in flight, got none (plan)");
  return *in_flight_;
}

void Scheduler::end_pass() {
  in_flight_ = nullptr;
  const std::vector<Sequence*> pass = std::move(pass_);
  pass_.clear();
  for (Sequence* s : pass) {
    if (s->aborted) finish(*s, "abort");
  }
}

void Scheduler::report_enter(const uint8_t* decisions, size_t size) {
  const bool shallow = options_.kv_strategy == KvStrategy::kRecursion;
  if (decisions != nullptr) {
    expect_size("decisions", pass().num_rows(), size);
    if (options_.router == Router::kNone) {
      throw std::invalid_argument("decisions: expected none without a router, got an array");
    }
    if (!shallow && std::find(decisions, decisions + size, 0) != decisions + size) {
      throw std::invalid_argument(
          "decisions: expected every row to take recursion 1, whose keys are shared, got a 0");
    }
  }
  stats_.enter_rows += pass().num_rows();
  size_t row = 0;
  for (Sequence* s : pass_) {
    Chunk& chunk = s->chunk;
    s->counts[0] += chunk.length;
    chunk.depths.assign(chunk.length, 0);
    chunk.recursion = 1;
    for (int32_t i = 0; i < chunk.length; ++i, ++row) {
      const int32_t all = s->request.max_recursions;
      const int32_t given = decisions == nullptr ? all : decisions[row];
      if (options_.router == Router::kToken) {
        chunk.targets.push_back(static_cast<uint8_t>(std::min(given, all)));
      }
      if (given > 0) chunk.active.push_back(i);
    }
    s->state = chunk.active.empty() ? State::kExit : State::kBlock;
  }
  end_pass();
}

void Scheduler::append_active(Sequence& s) {
  const int32_t r = s.chunk.recursion, rows = static_cast<int32_t>(s.chunk.active.size());
  const auto [first, last] = appended_groups(s, r);
  for (int32_t g = first; g <= last; ++g) s.counts[g] += rows;
  if (options_.window > 0 && options_.kv_strategy == KvStrategy::kRecursion) {
    for (const int32_t i : s.chunk.active) s.places[r].push_back(s.done + i);
  }
}

void Scheduler::report_block(const uint8_t* keep, size_t size) {
  if (keep != nullptr) {
    expect_size("decisions", pass().num_rows(), size);
    if (options_.router != Router::kExpert) {
      throw std::invalid_argument(
          "decisions: expected none where depths are known as rows enter, got an array");
    }
  }
  for (Sequence* s : running_) s->chunk.waited += s->state == State::kExit;
  size_t row = 0;
  for (Sequence* s : pass_) {
    append_active(*s);
    Chunk& chunk = s->chunk;
    const int32_t r = chunk.recursion;
    size_t kept = 0;
    for (const int32_t i : chunk.active) {
      chunk.depths[i] = static_cast<uint8_t>(r);
      const bool goes_on = (keep == nullptr || keep[row]) && r < s->request.max_recursions &&
                           (options_.router != Router::kToken || chunk.targets[i] > r);
      ++row;
      if (goes_on) chunk.active[kept++] = i;
    }
    chunk.active.resize(kept);
    ++chunk.recursion;
    if (kept == 0) s->state = State::kExit;
  }
  ++stats_.block_passes;
  stats_.block_rows += static_cast<int64_t>(row);
  end_pass();
}

void Scheduler::report_exit(const int64_t* tokens, size_t num_tokens, const uint8_t* stop,
                            size_t num_stop) {
  expect_size("tokens", pass().sample_ids.size(), num_tokens);
  if (stop != nullptr) expect_size("decisions", num_tokens, num_stop);
  for (size_t i = 0; i < num_tokens; ++i) {
    if (tokens[i] < 0 || tokens[i] > INT32_MAX) {
      throw std::invalid_argument("tokens: expected 0 to 2^31 - 1, got " +
                                  std::to_string(tokens[i]));
    }
  }
  stats_.exit_rows += pass().num_rows();
  stats_.growth_ratio =
      std::max(std::min(kLeastRatio, options_.growth_ratio), stats_.growth_ratio * kRatioDecay);
  enter_next_ = true;
  const std::vector<Sequence*> pass = pass_;
  std::erase_if(pass_, [](const Sequence* s) { return !s->aborted; });  // others may end below
  for (Sequence* s : pass) {
    const bool samples = s->chunk.length == s->remaining() && s->request.max_tokens > 0;
    commit_chunk(*s);
    if (samples) {
      const int32_t n = s->request.n;
      if (n > 1 && !s->aborted) fork(*s, tokens, stop);
      if (!s->aborted) take_token(*s, tokens[0], stop != nullptr && stop[0]);
      tokens += n;
      if (stop != nullptr) stop += n;
    } else if (s->remaining() == 0 && !s->aborted) {
      take_token(*s, -1, false);
    }
  }
  end_pass();
  if (sequences_.empty()) {  // whatever comes next does not follow these ends
    enter_next_ = false;
    last_exit_seconds_ = 0;
  }
}

void Scheduler::commit_chunk(Sequence& s) {
  int64_t recent = 0;
  for (const uint8_t depth : s.chunk.depths) {
    ++stats_.exit_depths[depth];
    ++recent_[depth];
  }
  for (const int64_t exits : recent_) recent += exits;
  if (recent >= kMostRecentExits) {
    for (int64_t& exits : recent_) exits /= 2;
  }
  s.depths.insert(s.depths.end(), s.chunk.depths.begin(), s.chunk.depths.end());
  s.done += s.chunk.length;
  s.state = State::kEnter;
  release_chunk(s);
  commit_prefix(s);
}

// Gives the tree what was computed, in whole nodes.
void Scheduler::commit_prefix(Sequence& s) {
  if (!options_.prefix_cache || !s.request.prefix_cache || !s.cacheable) return;
  const int32_t size = options_.block_size;
  if (s.node_end + size > s.done) return;
  if (!tree_.alive(s.node)) {
    // Its node was evicted through a block that it had copied: start again with its own blocks.
    s.node = {};
    s.node_end = 0;
  }
  std::vector<int32_t> counts(group_tokens_.size());
  if (s.node.index >= 0) counts = tree_.node(s.node).counts;
  for (; s.node_end + size <= s.done; s.node_end += size) {
    const std::span tokens = std::span(std::as_const(s.request.tokens)).subspan(s.node_end, size);
    const std::span depths = std::span(std::as_const(s.depths)).subspan(s.node_end, size);
    counts[0] += size;
    for (const uint8_t depth : depths) {
      for (int32_t r = 1; r <= depth; ++r) {
        const auto [first, last] = appended_groups(s, r);
        for (int32_t g = first; g <= last; ++g) ++counts[g];
      }
    }
    NodeHandle next = tree_.child(s.node, s.salt, tokens);
    if (next.index < 0) {
      next = tree_.insert(s.node, s.salt, tokens, depths, counts, s.tables);
    } else if (!std::equal(depths.begin(), depths.end(), tree_.node(next).depths.begin())) {
      // Rounding flipped a depth between two sequences with the same tokens: their slots differ.
      s.cacheable = false;
      return;
    }
    s.node = next;
  }
}

// The children of a request with n > 1: whole blocks are shared, the tails copied before the next
// pass into blocks that were reserved before this one.
void Scheduler::fork(Sequence& parent, const int64_t* tokens, const uint8_t* stop) {
  const int32_t n = parent.request.n;
  parent.request.n = 1;
  size_t reserved = 0;
  for (int32_t k = 1; k < n; ++k) {
    const int64_t id = parent.id + k;
    auto child = std::make_unique<Sequence>(id, parent.request, parent.arrival, pool_,
                                            options_.num_recursions + 1);
    child->state = State::kEnter;
    child->done = parent.done;
    child->depths = parent.depths;
    child->counts = parent.counts;
    child->places = parent.places;
    child->node = parent.node;
    child->node_end = parent.node_end;
    child->cacheable = parent.cacheable;
    for (size_t g = 0; g < group_tokens_.size(); ++g) {
      const int32_t t = group_tokens_[g], group = static_cast<int32_t>(g);
      if (t == 0) continue;
      const int32_t whole = parent.counts[g] / t;
      for (int32_t i = 0; i < whole; ++i) child->tables.share(group, parent.tables[group][i]);
      if (parent.counts[g] % t == 0) continue;
      const int32_t block = parent.fork_blocks[reserved++];
      child->tables.adopt(group, block);
      copy_block(id, parent.tables[group][whole], block);
    }
    Sequence& s = *child;
    running_.insert(
        std::upper_bound(running_.begin(), running_.end(), id,
                         [](int64_t x, const Sequence* other) { return x < other->id; }),
        child.get());
    if (s.request.deadline < std::numeric_limits<double>::infinity())
      deadlines_.emplace(s.request.deadline, id);
    sequences_.emplace(id, std::move(child));
    take_token(s, tokens[k], stop != nullptr && stop[k]);
  }
  parent.fork_blocks.clear();
}

// token -1: there is none to take, as with max_tokens = 0.
void Scheduler::take_token(Sequence& s, int64_t token, bool stop) {
  if (token >= 0) {
    s.request.tokens.push_back(static_cast<int32_t>(token));
    ++stats_.sampled_tokens;
  }
  if (stop) {
    finish(s, "stop");
  } else if (s.generated() >= s.request.max_tokens) {
    finish(s, "length");
  }
}

std::vector<std::pair<int64_t, std::string>> Scheduler::take_finished() {
  return std::exchange(finished_, {});
}

const Sequence* Scheduler::sequence(int64_t id) const {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second.get();
}

Stats Scheduler::stats() const {
  Stats stats = stats_;
  stats.running = static_cast<int32_t>(running_.size());
  stats.waiting = static_cast<int32_t>(sequences_.size() - running_.size());
  stats.blocks_free = pool_.num_free();
  stats.blocks_cached = pool_.num_cached();
  return stats;
}

}  // namespace mor::host
