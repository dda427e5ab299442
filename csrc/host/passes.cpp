// Which pass comes next, and its arrays.
#include <algorithm>
#include <stdexcept>

#include "scheduler.h"

namespace mor::host {

std::shared_ptr<const Plan> Scheduler::plan(double now) {
  if (in_flight_) {
    throw std::invalid_argument("plan: expected the results of the pass in flight first (report)");
  }
  if (!(now >= time_)) {
    throw std::invalid_argument("now: expected a time of at least " + std::to_string(time_) +
                                ", got " + std::to_string(now));
  }
  time_ = now;
  while (!deadlines_.empty() && deadlines_.begin()->first <= time_) {
    finish(*sequences_.at(deadlines_.begin()->second), "deadline");
  }
  std::shared_ptr<Plan> plan = choose();
  for (const Copy& copy : copies_) {
    if (copy.source == copy.destination) continue;
    plan->copy_sources.push_back(copy.source);
    plan->copy_destinations.push_back(copy.destination);
  }
  for (const int32_t block : fresh_) {
    const auto& copied = plan->copy_destinations;
    if (std::find(copied.begin(), copied.end(), block) == copied.end()) {
      plan->fresh_blocks.push_back(block);
    }
  }
  copies_.clear();
  fresh_.clear();
  if (plan->kind != Plan::Kind::kIdle) in_flight_ = plan;
  return plan;
}

std::shared_ptr<Plan> Scheduler::choose() {
  // A round that plans nothing has preempted a sequence, so there are few.
  for (int64_t before = -1;;) {
    if (before == stats_.preemptions) throw std::logic_error("scheduler: no pass is possible");
    before = stats_.preemptions;
    std::shared_ptr<Plan> plan;
    if (enter_next_) {
      enter_next_ = false;
      plan = plan_enter();
      last_exit_seconds_ = 0;
      if (plan) return plan;
    }
    int32_t active = 0, exiting = 0;
    for (const Sequence* s : running_) {
      if (s->state == State::kBlock) active += static_cast<int32_t>(s->chunk.active.size());
      if (s->state == State::kExit) exiting += s->chunk.length;
    }
    const bool ends = active == 0 || ends_are_due(active, exiting + enterable_rows());
    if (ends && exiting > 0) {
      if ((plan = plan_exit())) {
        ++stats_.ends_passes;
        return plan;
      }
    } else if (ends && (plan = plan_enter())) {
      ++stats_.ends_passes;
      return plan;
    } else if (active > 0) {
      if ((plan = plan_block())) return plan;
    } else if (sequences_.empty()) {
      return std::make_shared<Plan>();
    }
  }
}

// Rows that are expected to leave in the next block pass, by the depths of late.
double Scheduler::leaving_rows() const {
  std::vector<double> share(options_.num_recursions + 1, 1.0);
  int64_t deeper = 0;
  for (int32_t r = options_.num_recursions; r >= 1; --r) {
    deeper += recent_[r];
    if (deeper > 0) share[r] = static_cast<double>(recent_[r]) / static_cast<double>(deeper);
  }
  double rows = 0;
  for (const Sequence* s : running_) {
    const Chunk& chunk = s->chunk;
    if (s->state != State::kBlock) continue;
    if (chunk.recursion == s->request.max_recursions) {
      rows += static_cast<double>(chunk.active.size());
    } else if (options_.router == Router::kExpert) {
      rows += static_cast<double>(chunk.active.size()) * share[chunk.recursion];
    } else if (options_.router == Router::kToken) {
      for (const int32_t i : chunk.active) rows += chunk.targets[i] == chunk.recursion;
    }
  }
  return rows;
}

bool Scheduler::ends_are_due(int32_t active, int32_t waiting) const {
  if (waiting == 0) return false;
  const Curve& block = options_.block_seconds;
  const Curve& ends = options_.ends_seconds;
  const bool timed = !block.empty() && !ends.empty();
  for (const Sequence* s : running_) {
    if (s->state != State::kExit) continue;
    if (s->chunk.waited >= options_.max_wait) return true;
    // Another block pass before the ends would be too much.
    if (timed && time_ + block.seconds(active) + ends.seconds(waiting) > s->request.deadline) {
      return true;
    }
  }
  if (!options_.automatic) return waiting >= options_.theta * (active + waiting);
  const double leaving = leaving_rows();
  const double saved =
      waiting * (ends.seconds_a_row(waiting) - ends.seconds_a_row(waiting + leaving));
  const double lost =
      active * (block.seconds_a_row(active) - block.seconds_a_row(active + waiting));
  return !(saved > lost);
}

// Prompt rows that may be in flight: as many as at most double a block pass of those that decode.
int32_t Scheduler::prompt_budget() const {
  int32_t decoding = 0;
  for (const Sequence* s : running_) decoding += s->remaining() == 1;
  if (decoding == 0 || options_.block_seconds.empty()) return options_.chunk;
  const double most = 2 * options_.block_seconds.seconds(decoding);
  int32_t fit = 1, more = options_.chunk;  // one row must fit, or the prompt would wait for ever
  while (fit < more) {
    const int32_t middle = fit + (more - fit + 1) / 2;
    if (options_.block_seconds.seconds(decoding + middle) <= most) {
      fit = middle;
    } else {
      more = middle - 1;
    }
  }
  return fit;
}

// Rows of its next chunk beside that many prompt rows in flight; a single token has its own place.
int32_t Scheduler::enter_rows(const Sequence& s, int32_t prompt_rows) const {
  if (s.remaining() == 1) return 1;
  return std::clamp(prompt_budget() - prompt_rows, 0, s.remaining());
}

int32_t Scheduler::enterable_rows() const {
  int32_t rows = 0, prompt_rows = prompt_rows_;
  const auto count = [&](const Sequence& s) {
    const int32_t its_rows = enter_rows(s, prompt_rows);
    rows += its_rows;
    if (s.remaining() > 1) prompt_rows += its_rows;
  };
  for (const Sequence* s : running_) {
    if (s->state == State::kEnter) count(*s);
  }
  const Sequence* next = head();
  if (next != nullptr && !preempted_ && num_running() + next->request.n <= options_.max_rows &&
      fits(*next, next->counts, 0, 0)) {
    count(*next);
  }
  return rows;
}

// Blocks for `tokens` tokens in each of the groups first .. last.
bool Scheduler::reserve(Sequence& s, int32_t first, int32_t last, int32_t tokens) {
  const auto missing = [&](int32_t g) {
    const int32_t t = group_tokens_[g], have = static_cast<int32_t>(s.tables[g].size());
    return t == 0 ? 0 : std::max(0, (tokens + t - 1) / t - have);
  };
  int64_t total = 0;
  for (int32_t g = first; g <= last; ++g) total += missing(g);
  if (!make_room(s, total)) return false;
  for (int32_t g = first; g <= last; ++g) {
    for (int32_t i = missing(g); i > 0; --i) s.tables.adopt(g, allocate());
  }
  return true;
}

void Scheduler::begin_chunk(Sequence& s) {
  const int32_t rows = enter_rows(s, prompt_rows_);
  if (rows == 0 || !reserve(s, 0, 0, s.done + rows)) return;
  s.chunk.length = rows;
  s.chunk.prompt = s.remaining() > 1;
  if (s.chunk.prompt) prompt_rows_ += rows;
  for (int32_t i = 0; i < rows; ++i) {
    s.chunk.slots.push_back(free_slots_.back());
    free_slots_.pop_back();
  }
}

std::shared_ptr<Plan> Scheduler::plan_enter() {
  const bool closed = preempted_ && !running_.empty();
  preempted_ = false;
  const std::vector<Sequence*> running = running_;
  for (Sequence* s : running) {
    if (s->state == State::kEnter) begin_chunk(*s);
  }
  while (!closed && !preempted_) {
    Sequence* next = head();
    if (next == nullptr || num_running() + next->request.n > options_.max_rows ||
        enter_rows(*next, prompt_rows_) == 0 || !admit(*next)) {
      break;
    }
    begin_chunk(*next);
  }
  preempted_ = false;
  auto plan = std::make_shared<Plan>();
  plan->kind = Plan::Kind::kEnter;
  pass_.clear();
  for (Sequence* s : running_) {
    if (s->state == State::kEnter && s->chunk.length > 0) pass_.push_back(s);
  }
  if (pass_.empty()) return nullptr;
  for (const Sequence* s : pass_) {
    plan->ids.push_back(s->id);
    for (int32_t i = 0; i < s->chunk.length; ++i) {
      const int32_t position = s->done + i;
      plan->slots.push_back(s->chunk.slots[i]);
      plan->tokens.push_back(s->request.tokens[position]);
      plan->thresholds.push_back(static_cast<float>(s->request.threshold));
      add_context(*plan, *s, 0, position, position + 1);
      plan->positions.push_back(position);
      plan->slot_mapping.push_back(slot(*s, 0, position));
    }
    plan->cu_seqlens.push_back(plan->num_rows());
  }
  add_tables(*plan, [](const Sequence&) { return 0; });
  if (!options_.ends_seconds.empty()) {
    // The exit pass before it has paid for its rows.
    plan->expected_seconds =
        std::max(0.0, options_.ends_seconds.seconds(plan->num_rows()) - last_exit_seconds_);
  }
  return plan;
}

// Groups that recursion r appends to: first .. last, none where first > last.
std::pair<int32_t, int32_t> Scheduler::appended_groups(const Sequence& s, int32_t r) const {
  if (options_.kv_strategy == KvStrategy::kRecursion) return {r, r};
  if (r > 1) return {1, 0};
  return {1, options_.kv_strategy == KvStrategy::kHybrid ? s.request.max_recursions : 1};
}

std::shared_ptr<Plan> Scheduler::plan_block() {
  const std::vector<Sequence*> running = running_;
  for (Sequence* s : running) {
    if (s->state != State::kBlock) continue;
    const auto [first, last] = appended_groups(*s, s->chunk.recursion);
    if (first > last) continue;
    reserve(*s, first, last, s->counts[first] + static_cast<int32_t>(s->chunk.active.size()));
  }
  pass_.clear();
  for (Sequence* s : running_) {
    if (s->state == State::kBlock) pass_.push_back(s);
  }
  if (pass_.empty()) return nullptr;
  std::stable_sort(pass_.begin(), pass_.end(), [](const Sequence* a, const Sequence* b) {
    return a->chunk.recursion < b->chunk.recursion;
  });
  auto plan = std::make_shared<Plan>();
  plan->kind = Plan::Kind::kBlock;
  plan->recursion_offsets.assign(options_.num_recursions + 1, 0);
  for (const Sequence* s : pass_) {
    plan->ids.push_back(s->id);
    add_block_rows(*plan, *s);
    plan->cu_seqlens.push_back(plan->num_rows());
    plan->recursion_offsets[s->chunk.recursion] = plan->num_rows();
  }
  for (int32_t r = 1; r <= options_.num_recursions; ++r) {
    plan->recursion_offsets[r] =
        std::max(plan->recursion_offsets[r], plan->recursion_offsets[r - 1]);
  }
  if (options_.kv_strategy == KvStrategy::kHybrid) {
    const int64_t rows = plan->num_rows();
    plan->write_through.assign((options_.num_recursions - 1) * rows, -1);
    int64_t row = 0;
    for (const Sequence* s : pass_) {
      const int64_t active = static_cast<int64_t>(s->chunk.active.size());
      for (int32_t r = 2; s->chunk.recursion == 1 && r <= s->request.max_recursions; ++r) {
        for (int64_t i = 0; i < active; ++i) {
          plan->write_through[(r - 2) * rows + row + i] = slot(*s, r, s->done + s->chunk.active[i]);
        }
      }
      row += active;
    }
  }
  add_tables(*plan, [this](const Sequence& s) { return attended_group(s.chunk.recursion); });
  if (!options_.block_seconds.empty()) {
    plan->expected_seconds = options_.block_seconds.seconds(plan->num_rows());
  }
  return plan;
}

void Scheduler::add_block_rows(Plan& plan, const Sequence& s) const {
  const int32_t r = s.chunk.recursion, group = attended_group(r);
  const bool ranks = options_.kv_strategy == KvStrategy::kRecursion;
  for (size_t i = 0; i < s.chunk.active.size(); ++i) {
    const int32_t position = s.done + s.chunk.active[i];
    const int32_t place = ranks ? s.counts[r] + static_cast<int32_t>(i) : position;
    const bool appends = options_.kv_strategy != KvStrategy::kShared || r == 1;
    plan.slots.push_back(s.chunk.slots[s.chunk.active[i]]);
    plan.recursions.push_back(r);
    plan.thresholds.push_back(static_cast<float>(s.request.threshold));
    add_context(plan, s, group, position, place + 1);
    plan.positions.push_back(position);
    plan.slot_mapping.push_back(appends ? slot(s, group, place) : -1);
  }
}

std::shared_ptr<Plan> Scheduler::plan_exit() {
  const std::vector<Sequence*> running = running_;
  for (Sequence* s : running) {
    if (s->state != State::kExit || s->request.n == 1 || s->chunk.length < s->remaining()) continue;
    int32_t tails = 0;
    for (size_t g = 0; g < group_tokens_.size(); ++g) {
      tails += group_tokens_[g] > 0 && s->counts[g] % group_tokens_[g] > 0;
    }
    const int32_t blocks = tails * (s->request.n - 1);
    if (!make_room(*s, blocks)) continue;
    for (int32_t i = 0; i < blocks; ++i) s->fork_blocks.push_back(allocate());
  }
  pass_.clear();
  for (Sequence* s : running_) {
    if (s->state == State::kExit) pass_.push_back(s);
  }
  if (pass_.empty()) return nullptr;
  auto plan = std::make_shared<Plan>();
  plan->kind = Plan::Kind::kExit;
  std::vector<int32_t> order;
  const auto add_rows = [&](const Sequence& s, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; ++i) {
      plan->slots.push_back(s.chunk.slots[i]);
      plan->positions.push_back(s.done + i);
      plan->slot_mapping.push_back(slot(s, 0, s.done + i));
      plan->recursions.push_back(s.chunk.depths[i]);
    }
  };
  // The first row whose logits anybody needs: a prompt's last, or all of them.
  const auto first_logits = [](const Sequence& s) {
    if (s.request.prompt_logits) return 0;
    const bool samples = s.chunk.length == s.remaining() && s.request.max_tokens > 0;
    return s.chunk.length - (samples ? 1 : 0);
  };
  for (const Sequence* s : pass_) {
    const int32_t first = first_logits(*s);
    if (first == s->chunk.length) continue;
    plan->ids.push_back(s->id);
    for (int32_t i = first; i < s->chunk.length; ++i) {
      add_context(*plan, *s, 0, s->done + i, s->done + i + 1);
    }
    add_rows(*s, first, s->chunk.length);
    plan->cu_seqlens.push_back(plan->num_rows());
    if (s->chunk.length < s->remaining() || s->request.max_tokens == 0) continue;
    for (int32_t k = 0; k < s->request.n; ++k) {
      plan->sample_rows.push_back(plan->num_rows() - 1);
      plan->sample_ids.push_back(s->id + k);
    }
  }
  plan->num_logit_rows = plan->num_rows();
  add_tables(*plan, [](const Sequence&) { return 0; });
  for (const Sequence* s : pass_) add_rows(*s, 0, first_logits(*s));
  if (!options_.ends_seconds.empty()) {
    // Rows without logits cost next to nothing.
    plan->expected_seconds = options_.ends_seconds.seconds(std::max(1, plan->num_logit_rows));
  }
  last_exit_seconds_ = plan->expected_seconds;
  return plan;
}

int64_t Scheduler::slot(const Sequence& s, int32_t group, int32_t place) const {
  const int32_t t = group_tokens_[group];
  return t == 0 ? -1 : static_cast<int64_t>(s.tables[group][place / t]) * t + place % t;
}

// The block tables of plan.ids, by the group that each attends to.
template <typename Group>
void Scheduler::add_tables(Plan& plan, Group group) const {
  std::vector<const std::vector<int32_t>*> tables;
  for (const int64_t id : plan.ids) {
    const Sequence& s = *sequences_.at(id);
    tables.push_back(&s.tables[group(s)]);
    plan.max_blocks = std::max(plan.max_blocks, static_cast<int32_t>(tables.back()->size()));
  }
  plan.block_table.assign(tables.size() * plan.max_blocks, -1);
  auto row = plan.block_table.begin();
  for (const auto* table : tables) {
    std::copy(table->begin(), table->end(), row);
    row += plan.max_blocks;
  }
}

void Scheduler::add_context(Plan& plan, const Sequence& s, int32_t group, int32_t position,
                            int32_t length) const {
  plan.context_lens.push_back(length);
  if (options_.window == 0) return;
  // The first slot whose position is in the window; slots are not positions where rows left.
  const int32_t first = std::max(0, position - options_.window + 1);
  if (group == 0 || options_.kv_strategy != KvStrategy::kRecursion) {
    plan.context_starts.push_back(first);
    return;
  }
  const auto& places = s.places[group];
  const auto& active = s.chunk.active;
  auto start = std::lower_bound(places.begin(), places.end(), first) - places.begin();
  if (start == static_cast<int64_t>(places.size())) {
    start += std::lower_bound(active.begin(), active.end(), first - s.done) - active.begin();
  }
  plan.context_starts.push_back(static_cast<int32_t>(start));
}

}  // namespace mor::host
