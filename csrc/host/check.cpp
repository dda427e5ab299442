// Every block, slot, row and queue accounted for.
#include <algorithm>
#include <stdexcept>

#include "scheduler.h"

namespace mor::host {
namespace {

void demand(bool holds, int64_t id, const char* what) {
  if (holds) return;
  throw std::logic_error("scheduler: sequence " + std::to_string(id) + " " + what);
}

}  // namespace

void Scheduler::check_sequence(const Sequence& s, std::vector<int32_t>& references,
                               std::vector<int32_t>& slots) const {
  const Chunk& chunk = s.chunk;
  for (const int32_t slot : chunk.slots) ++slots[slot];
  for (const int32_t block : s.fork_blocks) ++references[block];
  const bool entered = s.state == State::kBlock || s.state == State::kExit;
  const bool flies = in_flight_ && std::find(pass_.begin(), pass_.end(), &s) != pass_.end();
  demand(s.fork_blocks.empty() || flies, s.id, "keeps blocks for children after their fork");
  demand(static_cast<int32_t>(chunk.slots.size()) == chunk.length, s.id,
         "has rows without a slot of the state pool");
  demand(entered || flies || chunk.length == 0, s.id, "has rows in flight between its chunks");
  demand(!entered || chunk.length > 0, s.id, "has no rows in flight");
  demand((s.state == State::kBlock) == !chunk.active.empty(), s.id, "is in the wrong queue");
  demand(std::is_sorted(chunk.active.begin(), chunk.active.end()), s.id, "has rows out of order");
  demand(s.remaining() > 0 && chunk.length <= s.remaining(), s.id, "has nothing to compute");
  demand(static_cast<int32_t>(s.depths.size()) == s.done, s.id, "has lost a depth");
  demand(s.counts[0] == s.done + (entered ? chunk.length : 0), s.id, "has lost a row of group E");
  for (size_t g = 0; g < group_tokens_.size(); ++g) {
    const auto& table = s.tables[static_cast<int32_t>(g)];
    for (const int32_t block : table) ++references[block];
    const int32_t t = group_tokens_[g];
    const int32_t used = t == 0 ? 0 : (s.counts[g] + t - 1) / t;
    const int32_t size = static_cast<int32_t>(table.size());
    demand(size == used || (flies && size > used), s.id, "has more or fewer blocks than it fills");
    demand(s.state != State::kWaiting || size == 0, s.id, "waits with blocks");
  }
}

void Scheduler::check() const {
  pool_.check();
  tree_.check();
  std::vector<int32_t> references(pool_.num_blocks());
  std::vector<int32_t> slots(options_.max_rows + options_.chunk);
  int32_t prompt_rows = 0;
  size_t running = 0, waiting = 0;
  for (const auto& [id, s] : sequences_) {
    check_sequence(*s, references, slots);
    if (s->chunk.prompt) prompt_rows += s->chunk.length;
    if (s->state == State::kWaiting) {
      const auto ids = waiting_.find(s->request.priority);
      demand(ids != waiting_.end() && ids->second.count(id) == 1, id, "is in no queue");
      ++waiting;
    } else {
      demand(running < running_.size() && running_[running] == s.get(), id,
             "is out of order of arrival");
      ++running;
    }
  }
  size_t queued = 0;
  for (const auto& [priority, ids] : waiting_) queued += ids.size();
  demand(running == running_.size() && waiting == queued, -1, "that ended is still in a queue");
  for (int32_t block = 0; block < pool_.num_blocks(); ++block) {
    if (references[block] != pool_.references(block)) {
      throw std::logic_error("scheduler: block " + std::to_string(block) + " has " +
                             std::to_string(pool_.references(block)) + " references, but " +
                             std::to_string(references[block]) + " tables hold it");
    }
  }
  for (const int32_t slot : free_slots_) ++slots[slot];
  if (std::any_of(slots.begin(), slots.end(), [](int32_t uses) { return uses != 1; })) {
    throw std::logic_error("scheduler: a slot of the state pool is lost or used twice");
  }
  if (prompt_rows != prompt_rows_) {
    throw std::logic_error("scheduler: the count of prompt rows in flight is wrong");
  }
  if (num_running() > options_.max_rows) {
    throw std::logic_error("scheduler: more sequences run than max_rows");
  }
}

}  // namespace mor::host
