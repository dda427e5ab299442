// Sizes that were found by measuring, with their reasons. Those of tiles stand with the tiles,
// whose registers they follow from.
#pragma once

#include <cstdint>

namespace mor {

// A thread takes at least some 30 us of work: less does not pay for waking it. In rows of scores,
// in products of matches, in bytes of rows that are copied or summed.
constexpr int64_t kRowsPerThread = 32768;
constexpr int64_t kProductsPerThread = 1 << 20;
constexpr int64_t kBytesPerThread = int64_t{64} << 10;

// Rows are fetched this far ahead of their use: enough to hide the latency of memory, little enough
// to stay in the first cache.
constexpr int64_t kBytesAhead = 8192;

// Results of this size are written around the cache (half of the last-level cache of common
// machines): alone that is up to twice as fast, and it loses nothing where the result is read next.
constexpr int64_t kStreamBytes = int64_t{12} << 20;

// Results of at least this size are cached after they are freed; below it the C library's own reuse
// is as good. The cache holds at most so much, and evicts the oldest first.
constexpr int64_t kLargeResult = int64_t{4} << 20;
constexpr int64_t kKeptResults = int64_t{256} << 20;

// group_rows: rows counted and placed at a time; and with more keys than this the scalar counting
// sort is as fast as masks.
constexpr int64_t kChunkRows = 4096;
constexpr int64_t kMaxMaskedKeys = 8;

// route_threshold: sequences up to this length are sorted in registers.
constexpr int64_t kShortSequence = 32;

// depth_attention: rows of a task of the forward, which fewer tasks than kEnoughTasks cut smaller,
// for those who have many threads; rows of a step of a task of the backward.
constexpr int64_t kForwardRows = 512, kLeastRows = 128, kEnoughTasks = 16;
constexpr int64_t kBackwardRows = 256;
// Up to this many rows decode.h is faster than tiles, of whose lanes most would be idle. It
// also gains from taking several key heads at once, whose rows are neighbours in memory.
constexpr int64_t kFewRows = 12;

}  // namespace mor
