// Who runs: admission, preemption, and the prefix that a sequence finds computed.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "scheduler.h"

namespace mor::host {
namespace {

// Tokens of full depth that the observed depths start from, so that few of them do not decide.
constexpr int64_t kPriorTokens = 64;
// Exits after which the 99th percentile of the depths is believed.
constexpr int64_t kEnoughExits = 100;
// The growth ratio: what part of max_tokens sequences are expected to use (as SGLang's). It rises
// when that proved too little; scheduler.cpp lets it decay.
constexpr double kRaisedRatio = 0.2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Sequence* Scheduler::head() const {
  Sequence* best = nullptr;
  double best_class = 0;
  // Within a priority the oldest comes first whatever the time, so the heads of all are enough.
  for (auto ids = waiting_.rbegin(); ids != waiting_.rend(); ++ids) {
    Sequence* s = sequences_.at(*ids->second.begin()).get();
    const double its_class =
        s->request.priority + std::floor((time_ - s->arrival) / options_.aging_s);
    if (best == nullptr || its_class > best_class ||
        (its_class == best_class && s->id < best->id)) {
      best = s;
      best_class = its_class;
    }
  }
  return best;
}

int32_t Scheduler::num_running() const {
  int32_t total = 0;
  for (const Sequence* s : running_) total += s->request.n;
  return total;
}

int64_t Scheduler::blocks_for(const Sequence& s, const std::vector<int32_t>& counts) const {
  const bool ranks =
      options_.kv_strategy == KvStrategy::kRecursion && options_.router != Router::kNone;
  int64_t total = 0;
  for (const int64_t exits : recent_) total += exits;
  int64_t deep = total, blocks = 0;
  for (int32_t g = 0; g <= s.request.max_recursions; ++g) {
    // deep: exits at depth g or deeper.
    if (g > 0) deep -= recent_[g - 1];
    if (group_tokens_[g] == 0) continue;
    int64_t tokens = s.length();
    if (ranks && g > 0) tokens = ceil_div(tokens * (deep + kPriorTokens), total + kPriorTokens);
    blocks += ceil_div(std::max<int64_t>(tokens, counts[g]), group_tokens_[g]) + s.request.n - 1;
  }
  return blocks;
}

double Scheduler::growth(const Sequence& s) const {
  int32_t deepest = s.request.max_recursions;
  if (options_.kv_strategy == KvStrategy::kRecursion && options_.router != Router::kNone) {
    int64_t total = 0, seen = 0;
    for (const int64_t exits : recent_) total += exits;
    for (int32_t d = 0; d < deepest && total >= kEnoughExits; ++d) {
      seen += recent_[d];
      if (100 * seen >= 99 * total) deepest = d;
    }
  }
  double blocks_a_token = 0;
  for (int32_t g = 0; g <= deepest; ++g) {
    if (group_tokens_[g] > 0) blocks_a_token += 1.0 / group_tokens_[g];
  }
  const int64_t tokens = static_cast<int64_t>(s.request.max_tokens - s.generated()) * s.request.n;
  return static_cast<double>(tokens) * stats_.growth_ratio * blocks_a_token;
}

// counts: those of the prefix that it shares; held_by_others: blocks of it that cost nothing;
// pinned: free blocks that it reads while it takes its own.
bool Scheduler::fits(const Sequence& s, const std::vector<int32_t>& counts, int64_t held_by_others,
                     int64_t pinned) const {
  const int64_t need = blocks_for(s, counts) - held_by_others;
  const int64_t available = pool_.num_free() - pinned;
  if (running_.empty()) return need <= available || pinned == 0;
  int64_t promised =
      static_cast<int64_t>(std::ceil(options_.watermark * pool_.num_blocks())) + need;
  double grown = 0;
  for (const Sequence* other : running_) {
    promised +=
        std::max<int64_t>(0, blocks_for(*other, other->counts) - other->tables.num_blocks());
    grown += growth(*other);
  }
  grown += growth(s);
  return static_cast<double>(promised) + grown <= static_cast<double>(available);
}

bool Scheduler::admit(Sequence& s) {
  NodeHandle hit;
  std::vector<std::vector<int32_t>> tables;
  if (options_.prefix_cache && s.request.prefix_cache && !s.request.prompt_logits) {
    // One token at least is computed: its logits give the next.
    hit = tree_.longest(s.salt, s.request.tokens, s.length() - 1);
  }
  if (hit.index >= 0) {
    tables = tree_.tables(hit);
    const std::vector<int32_t>& counts = tree_.node(hit).counts;
    int64_t held_by_others = 0, pinned = 0;
    for (size_t g = 0; g < tables.size(); ++g) {
      for (size_t i = 0; i < tables[g].size(); ++i) {
        const bool whole = static_cast<int32_t>(i) < counts[g] / group_tokens_[g];
        const bool held = pool_.references(tables[g][i]) > 0;
        held_by_others += whole && held;
        pinned += !whole && !held;
      }
    }
    if (!fits(s, counts, held_by_others, pinned)) hit = {};
  }
  if (hit.index < 0 && !fits(s, s.counts, 0, 0)) return false;
  const auto ids = waiting_.find(s.request.priority);
  ids->second.erase(s.id);
  if (ids->second.empty()) waiting_.erase(ids);
  const auto by_id = [](const Sequence* a, const Sequence* b) { return a->id < b->id; };
  running_.insert(std::lower_bound(running_.begin(), running_.end(), &s, by_id), &s);
  s.state = State::kEnter;
  if (hit.index >= 0) share_prefix(s, hit, tables);
  stats_.prefix_tokens += s.length();
  stats_.prefix_hit_tokens += s.done;
  return true;
}

void Scheduler::share_prefix(Sequence& s, NodeHandle hit,
                             const std::vector<std::vector<int32_t>>& tables) {
  // Taking blocks may evict the node itself, so everything is read first.
  s.counts = tree_.node(hit).counts;
  s.depths = tree_.depths(hit);
  s.done = static_cast<int32_t>(s.depths.size());
  s.node = hit;
  s.node_end = s.done;
  if (options_.window > 0) {
    for (int32_t p = 0; p < s.done; ++p) {
      for (int32_t r = 1; r <= s.depths[p]; ++r) s.places[r].push_back(p);
    }
  }
  std::vector<std::pair<int32_t, int32_t>> tails;  // group, block
  for (size_t g = 0; g < tables.size(); ++g) {
    for (size_t i = 0; i < tables[g].size(); ++i) {
      if (static_cast<int32_t>(i) < s.counts[g] / group_tokens_[g]) {
        s.tables.share(static_cast<int32_t>(g), tables[g][i]);
      } else {
        tails.emplace_back(g, tables[g][i]);
      }
    }
  }
  // A block that is read must not be taken for a copy of another.
  for (const auto& [group, source] : tails) pool_.add_reference(source);
  for (const auto& [group, source] : tails) {
    const int32_t block = allocate();
    s.tables.adopt(group, block);
    copy_block(s.id, source, block);
  }
  for (const auto& [group, source] : tails) pool_.release(source);
}

void Scheduler::preempt(Sequence& s) {
  drop(s);
  s.tables.clear();
  std::fill(s.counts.begin(), s.counts.end(), 0);
  for (auto& places : s.places) places.clear();
  s.depths.clear();
  s.done = s.node_end = 0;
  s.node = {};
  s.cacheable = true;
  s.state = State::kWaiting;
  running_.erase(std::find(running_.begin(), running_.end(), &s));
  waiting_[s.request.priority].insert(s.id);
  preempted_ = true;
  ++stats_.preemptions;
  stats_.growth_ratio = std::min(1.0, stats_.growth_ratio + kRaisedRatio);
}

bool Scheduler::make_room(const Sequence& s, int64_t blocks) {
  while (pool_.num_free() < blocks) {
    // The oldest, running_[0], is never preempted, so that something always ends.
    Sequence* victim = nullptr;
    for (size_t i = 1; i < running_.size(); ++i) {
      if (victim == nullptr || running_[i]->request.priority <= victim->request.priority) {
        victim = running_[i];
      }
    }
    if (victim == nullptr) throw std::logic_error("scheduler: a sequence alone lacks blocks");
    preempt(*victim);
    if (victim == &s) return false;
  }
  return true;
}

int32_t Scheduler::allocate() {
  const int32_t block = tree_.allocate();
  fresh_.push_back(block);
  return block;
}

void Scheduler::copy_block(int64_t id, int32_t source, int32_t destination) {
  copies_.push_back({id, source, destination});
}

}  // namespace mor::host
