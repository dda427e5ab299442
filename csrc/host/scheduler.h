// Scheduler: which rows run next, in which blocks their keys and values lie, and when exits pool.
//   No tensors, no clock and no randomness: time is an argument that does not decrease, and equal
//   calls give equal decisions. Calls alternate `plan` and `report`; `add` and `abort` may come at
//   any time, and what the pass in flight uses is freed when it is reported. The same class, with a
//   caller that draws depths instead of running a model, is the simulator.
//
//   Order. A sequence has one chunk in flight: a sampled token, or rows of its prompt. Its rows
//   take recursion r in one pass; a row whose router refuses recursion r + 1 waits, and when all
//   wait the chunk runs the last layer as a whole. So rows are appended to each group in order of
//   position, and no row runs the last layer before an earlier one of its sequence.
//   Beside sequences that decode, no more prompt rows are in flight than at most double their block
//   pass by its curve (without curves: `chunk` rows).
//   Groups. E (index 0) holds the first and the last layer, 1 .. R the shared block. Strategy
//   recursion: group r holds the rows that took recursion r, in slots that are ranks. shared: group
//   1 serves all recursions. hybrid: recursion 1 writes groups 1 .. R, later ones overwrite.
//   Ends. An exit pass is followed by an enter pass, in which the sampled tokens and new prompts go
//   on; together they are the ends. They run when no row is active, or by the policy: theta, when
//   that share of the rows waits (1 is lock-step); auto, unless
//       W (c_e(W) - c_e(W + D)) > A (c_b(A) - c_b(A + W)),   c(n) = seconds(n) / n,
//   where W rows wait, A are active and D of them are expected to leave in the next pass, by
//   their recursion and the depths of late (token-choice knows): pooling
//   then saves more on the ends than the block passes lose. Never more than max_wait passes, nor
//   past a deadline (serving design, section 3.5).
//   Memory. Blocks of all rows of a pass are reserved before it. Where they do not suffice, the
//   sequence of lowest priority, of these the newest, and never the oldest, is preempted: it
//   waits again and recomputes its tokens. Nothing is admitted in ends before which a sequence was
//   preempted. Admission is in order of priority (one class higher for each aging_s waited), then
//   of arrival, and needs the blocks of the prompt at the observed depth, the expected growth of
//   all that run and a watermark to be free; whoever is alone is admitted.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "block_pool.h"
#include "options.h"
#include "plan.h"
#include "prefix_tree.h"
#include "sequence.h"

namespace mor::host {

struct Stats {
  int32_t running = 0, waiting = 0;
  int32_t blocks = 0, blocks_free = 0, blocks_cached = 0;
  int64_t block_passes = 0, ends_passes = 0;  // an enter pass without an exit pass counts
  int64_t block_rows = 0, exit_rows = 0, enter_rows = 0;
  int64_t sampled_tokens = 0, preemptions = 0;
  int64_t prefix_tokens = 0, prefix_hit_tokens = 0;  // of admitted sequences
  std::vector<int64_t> exit_depths;                  // rows by depth 0 .. R
  double growth_ratio = 0;
};

class Scheduler {
 public:
  explicit Scheduler(Options options);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // The id of the first of n sequences, numbered id .. id + n - 1.
  int64_t add(Request request, double now);
  // False if there is no such sequence (any more). Before its prompt is computed, a request with
  // n > 1 is the one sequence `id`, and aborting it aborts all.
  bool abort(int64_t id);
  std::shared_ptr<const Plan> plan(double now);

  // Results of the pass in flight, in order of its rows. keep: whether each row takes the next
  // recursion; null: all do, as far as they may. Token-choice gives depths where rows enter.
  void report_enter(const uint8_t* keep_or_depths, size_t size);
  void report_block(const uint8_t* keep, size_t size);
  // A token for each of sample_rows, and whether its sequence ends with it; null: none does.
  void report_exit(const int64_t* tokens, size_t num_tokens, const uint8_t* stop, size_t num_stop);

  // Sequences that ended since the last call, and why: stop, length, abort, deadline.
  std::vector<std::pair<int64_t, std::string>> take_finished();
  bool has_work() const { return !sequences_.empty(); }
  bool in_flight() const { return in_flight_ != nullptr; }
  const Plan& pass() const;  // the one in flight
  const Options& options() const { return options_; }
  Stats stats() const;
  const Sequence* sequence(int64_t id) const;  // null if there is none
  // Throws std::logic_error unless every block, slot, row and queue is accounted for.
  void check() const;

 private:
  // scheduler.cpp
  void finish(Sequence& s, const char* reason);
  void release_chunk(Sequence& s);
  void drop(Sequence& s);
  void demand_pass(Plan::Kind kind, const char* name) const;
  void end_pass();
  void append_active(Sequence& s);
  void commit_chunk(Sequence& s);
  void commit_prefix(Sequence& s);
  void fork(Sequence& parent, const int64_t* tokens, const uint8_t* stop);
  void take_token(Sequence& s, int64_t token, bool stop);
  void check_sequence(const Sequence& s, std::vector<int32_t>& references,
                      std::vector<int32_t>& slots) const;

  // admission.cpp
  Sequence* head() const;
  int32_t num_running() const;  // with the children to come
  int64_t blocks_for(const Sequence& s, const std::vector<int32_t>& counts) const;
  double growth(const Sequence& s) const;
  bool fits(const Sequence& s, const std::vector<int32_t>& counts, int64_t held_by_others,
            int64_t pinned) const;
  bool admit(Sequence& s);
  void share_prefix(Sequence& s, NodeHandle hit, const std::vector<std::vector<int32_t>>& tables);
  void preempt(Sequence& s);
  // Makes that many blocks free by preemption; false: the sequence was preempted itself.
  bool make_room(const Sequence& s, int64_t blocks);
  int32_t allocate();
  void copy_block(int64_t id, int32_t source, int32_t destination);

  // passes.cpp
  std::shared_ptr<Plan> choose();
  double leaving_rows() const;
  bool ends_are_due(int32_t active, int32_t waiting) const;
  int32_t prompt_budget() const;
  int32_t enterable_rows() const;
  int32_t enter_rows(const Sequence& s, int32_t prompt_rows) const;
  bool reserve(Sequence& s, int32_t first_group, int32_t last_group, int32_t tokens);
  void begin_chunk(Sequence& s);
  std::shared_ptr<Plan> plan_enter();
  std::shared_ptr<Plan> plan_block();
  std::shared_ptr<Plan> plan_exit();
  std::pair<int32_t, int32_t> appended_groups(const Sequence& s, int32_t recursion) const;
  int32_t attended_group(int32_t recursion) const {
    return options_.kv_strategy == KvStrategy::kShared ? 1 : recursion;
  }
  int64_t slot(const Sequence& s, int32_t group, int32_t place) const;
  template <typename Group>
  void add_tables(Plan& plan, Group group) const;
  void add_block_rows(Plan& plan, const Sequence& s) const;
  void add_context(Plan& plan, const Sequence& s, int32_t group, int32_t position,
                   int32_t length) const;

  Options options_;
  const std::vector<int32_t> group_tokens_;
  BlockPool pool_;
  PrefixTree tree_;
  double time_ = 0;
  int64_t next_id_ = 0;
  std::map<int64_t, std::unique_ptr<Sequence>> sequences_;
  std::vector<Sequence*> running_;                // in order of arrival
  std::map<int32_t, std::set<int64_t>> waiting_;  // ids by priority, no empty set
  std::set<std::pair<double, int64_t>> deadlines_;
  std::vector<std::pair<int64_t, std::string>> finished_;
  std::vector<int32_t> free_slots_;  // the last one is used next
  int32_t prompt_rows_ = 0;          // in flight
  bool enter_next_ = false;          // an exit pass was reported
  bool preempted_ = false;           // since the last enter pass
  std::shared_ptr<const Plan> in_flight_;
  std::vector<Sequence*> pass_;  // sequences of the pass in flight
  struct Copy {
    int64_t id;
    int32_t source, destination;
  };
  std::vector<Copy> copies_;     // for the next pass
  std::vector<int32_t> fresh_;   // allocated for the next pass
  std::vector<int64_t> recent_;  // exits by depth, of late
  double last_exit_seconds_ = 0;
  Stats stats_;
};

}  // namespace mor::host
