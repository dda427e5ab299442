#include "options.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace mor::host {
namespace {

template <typename T>
void expect(bool holds, const char* option, const std::string& expected, const T& got) {
  if (holds) return;
  std::ostringstream text;
  text << option << ": expected " << expected << ", got " << got;
  throw std::invalid_argument(text.str());
}

template <typename T>
void at_least(T least, T value, const char* option) {
  expect(value >= least, option, "at least " + std::to_string(least), value);
}

}  // namespace

Curve::Curve(const std::string& option, std::vector<std::pair<double, double>> points)
    : points_(std::move(points)) {
  double last = 0;
  for (const auto& [rows, seconds] : points_) {
    expect(rows > last && std::isfinite(rows), option.c_str(), "increasing numbers of rows > 0",
           rows);
    expect(seconds > 0 && std::isfinite(seconds), option.c_str(), "seconds > 0", seconds);
    last = rows;
  }
}

double Curve::seconds(double rows) const {
  const auto after = std::upper_bound(points_.begin(), points_.end(), rows,
                                      [](double x, const auto& point) { return x < point.first; });
  if (after == points_.begin()) return points_.front().second;
  const auto& [x0, y0] = *(after - 1);
  if (after == points_.end()) return y0 * (rows / x0);
  const auto& [x1, y1] = *after;
  return y0 + (y1 - y0) * ((rows - x0) / (x1 - x0));
}

void Options::check() {
  at_least(1, num_blocks, "num_blocks");
  at_least(1, block_size, "block_size");
  at_least(0, ends_block_tokens, "ends_block_tokens");
  expect(num_recursions >= 1 && num_recursions <= 255, "num_recursions", "1 to 255",
         num_recursions);
  at_least(1, max_rows, "max_rows");
  at_least(1, chunk, "chunk");
  at_least(0, max_wait, "max_wait");
  at_least(0, window, "window");
  expect(theta >= 0 && theta <= 1, "policy", "auto, lock-step or a share of rows in [0, 1]", theta);
  expect(aging_s > 0, "aging_s", "seconds > 0", aging_s);
  expect(watermark >= 0 && watermark < 1, "watermark", "a share of the blocks in [0, 1)",
         watermark);
  expect(growth_ratio >= 0 && growth_ratio <= 1, "growth_ratio", "a share of max_tokens in [0, 1]",
         growth_ratio);
  expect(hash_bits >= 0 && hash_bits <= 64, "hash_bits", "0 to 64", hash_bits);
  if (automatic && (block_seconds.empty() || ends_seconds.empty())) {
    throw std::invalid_argument(
        "policy: expected block_seconds and ends_seconds with policy auto, got none; measure them "
        "or choose lock-step");
  }
  if (max_wait == 0) max_wait = num_recursions;
}

std::vector<int32_t> Options::group_tokens() const {
  std::vector<int32_t> tokens(num_recursions + 1, block_size);
  tokens[0] = ends_block_tokens;
  if (kv_strategy == KvStrategy::kShared) std::fill(tokens.begin() + 2, tokens.end(), 0);
  return tokens;
}

int64_t Request::most_blocks(const Options& options) const {
  // The last token that is sampled is never computed.
  const int64_t prompt = static_cast<int64_t>(tokens.size());
  const int64_t length = prompt + std::max(max_tokens, 1) - 1;
  int64_t alone = 0, forked = 0;
  const std::vector<int32_t> group_tokens = options.group_tokens();
  for (int32_t g = 0; g <= max_recursions; ++g) {
    if (group_tokens[g] == 0) continue;
    alone += (length + group_tokens[g] - 1) / group_tokens[g];
    forked += prompt / group_tokens[g] + n;
  }
  return n > 1 ? std::max(alone, forked) : alone;
}

void Request::check(const Options& options) {
  expect(!tokens.empty(), "tokens", "at least 1", 0);
  at_least(0, max_tokens, "max_tokens");
  expect(tokens.size() < (1U << 30) && max_tokens < (1 << 30), "tokens, max_tokens",
         "less than 2^30", std::to_string(tokens.size()) + " and " + std::to_string(max_tokens));
  expect(n >= 1 && n <= options.max_rows, "n",
         "1 to max_rows = " + std::to_string(options.max_rows), n);
  expect(n == 1 || max_tokens > 0, "n", "1 with max_tokens = 0", n);
  expect(!std::isnan(deadline), "deadline", "seconds", deadline);
  expect(!std::isnan(threshold), "threshold", "a number", threshold);
  if (max_recursions == 0) max_recursions = options.num_recursions;
  expect(max_recursions >= 1 && max_recursions <= options.num_recursions, "max_recursions",
         "1 to num_recursions = " + std::to_string(options.num_recursions), max_recursions);
  const int64_t blocks = most_blocks(options);
  expect(blocks <= options.num_blocks, "tokens, max_tokens",
         "a request that fits alone into num_blocks = " + std::to_string(options.num_blocks),
         std::to_string(tokens.size()) + " tokens and max_tokens " + std::to_string(max_tokens) +
             " with n " + std::to_string(n) + ", which may need " + std::to_string(blocks));
}

}  // namespace mor::host
