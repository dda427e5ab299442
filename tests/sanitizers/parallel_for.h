// Included before every source of a ThreadSanitizer build: torch::stable::parallel_for on
// std::thread. The one of PyTorch runs on OpenMP, whose runtime is not instrumented; its barriers
// are invisible to ThreadSanitizer, which takes every result for a race. Threads started and joined
// here are seen. Ranges are split whatever the grain, so that small tests have threads to race.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace mor::sanitizers {

inline thread_local bool inside = false;  // nested ranges run where they are, as in PyTorch

template <class F>
void run_range(int64_t begin, int64_t end, const F& f, std::exception_ptr& error) {
  inside = true;
  try {
    f(begin, end);
  } catch (...) {
    error = std::current_exception();
  }
  inside = false;
}

}  // namespace mor::sanitizers

namespace torch::stable {

template <class F>
void threads_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin >= end) return;
  const int64_t count = std::min<int64_t>(get_num_threads(), end - begin);
  if (count <= 1 || mor::sanitizers::inside) return f(begin, end);
  const int64_t part = (end - begin + count - 1) / count;
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = std::min(begin + i * part, end), last = std::min(first + part, end);
    if (first < last) {
      threads.emplace_back(
          [&, i, first, last] { mor::sanitizers::run_range(first, last, f, errors[i]); });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace torch::stable

#define parallel_for threads_for
