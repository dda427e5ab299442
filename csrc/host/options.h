// Options of the scheduler and of one request, checked in options.cpp: std::invalid_argument, which
// Python sees as ValueError, names the option, what was expected and what came.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace mor::host {

enum class Router { kExpert, kToken, kNone };
enum class KvStrategy { kRecursion, kShared, kHybrid };

// Seconds that a pass takes by its rows: measured points (rows, seconds), sorted by rows; linear
// between them, constant before the first, proportional to the rows after the last.
class Curve {
 public:
  Curve() = default;
  Curve(const std::string& option, std::vector<std::pair<double, double>> points);
  bool empty() const { return points_.empty(); }
  double seconds(double rows) const;
  double seconds_a_row(double rows) const { return seconds(rows) / rows; }

 private:
  std::vector<std::pair<double, double>> points_;
};

struct Options {
  int32_t num_blocks = 0;
  int32_t block_size = 16;        // tokens in a block of a middle group, and in a prefix node
  int32_t ends_block_tokens = 0;  // tokens in a block of group E; 0: no first and last layer
  int32_t num_recursions = 1;
  Router router = Router::kNone;
  KvStrategy kv_strategy = KvStrategy::kRecursion;
  int32_t max_rows = 64;  // sequences that run at once
  int32_t chunk = 128;    // prompt rows in flight at most
  bool automatic = true;  // policy "auto"; otherwise run the ends when this share of rows waits
  double theta = 1;
  int32_t max_wait = 0;  // block passes that an exited row waits at most; 0: num_recursions
  Curve block_seconds, ends_seconds;
  double aging_s = 10;
  double watermark = 0.01;    // share of the blocks that admission leaves free
  double growth_ratio = 0.5;  // of max_tokens that a sequence is expected to use, at the start
  bool prefix_cache = true;
  int32_t window = 0;  // of sliding attention; 0: none
  int hash_bits = 64;

  void check();
  // Tokens in a block of each group E, 1 .. R; 0: the group stores nothing.
  std::vector<int32_t> group_tokens() const;
};

struct Request {
  std::vector<int32_t> tokens;
  int32_t max_tokens = 0;
  int32_t priority = 0;
  double deadline = std::numeric_limits<double>::infinity();
  int32_t n = 1;
  int32_t max_recursions = 0;  // 0: num_recursions
  double threshold = 0;
  uint64_t tenant = 0;
  bool prefix_cache = true;
  bool prompt_logits = false;

  // The most blocks that this request can need while it runs alone.
  int64_t most_blocks(const Options& options) const;
  void check(const Options& options);
};

}  // namespace mor::host
