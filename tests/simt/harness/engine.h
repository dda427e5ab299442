// Shared by scheduler.cpp, which runs fibers, and warp.cpp, where they meet.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "simt.h"

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif

namespace simt {

enum class State : uint8_t { kReady, kAtBarrier, kInCollective, kReturned };

struct AsyncCopy {
  void* shared;
  const void* global;
  bool valid;
  int group;
};

// One CUDA thread and what it waits for.
struct Fiber {
  Thread thread;
  void* stack_pointer;
  State state;
  Site site;
  int predicate;  // of its barrier
  int barrier_result;
  WarpOp op;  // of its collective
  unsigned mask;
  uint64_t value;
  int b, c;
  WarpResult result;
  void* payload;
  Complete complete;
  std::vector<AsyncCopy> copies;
  int copy_group;
};

struct Engine {
  std::vector<Fiber> fibers;  // of the running block
  size_t num_live = 0;
  // A warp that has just met runs on before the others, as far ahead as it can: that uncovers
  // missing barriers. Threads released from a barrier wait in the queue.
  std::vector<int> first;
  std::vector<int> queue;
  size_t queue_head = 0;
  std::vector<int> at_barrier;
  BarrierOp barrier_op;
  Site barrier_site;

  Fiber* running = nullptr;
  void* main_stack_pointer = nullptr;
  char* stacks = nullptr;
  size_t stack_bytes = 0, num_stacks = 0;
  const std::function<void()>* body = nullptr;
  const char* kernel_name = "";
  Dim block_index;
  std::string error;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int order = 0;
  std::mt19937 random;

  int number(const Fiber* fiber) const { return int(fiber - fibers.data()); }
};
extern Engine engine;

// Appends the threads in the order that tests chose.
void append_in_order(std::vector<int>& list, std::vector<int> threads);
// Leaves the running fiber, blocked or queued, for the next one that can run.
void switch_to_next(Fiber* me);
// Gives the engine stacks for so many fibers.
void reserve_stacks(size_t num_threads);
// Runs engine.body in every thread of one block.
void run_block(Dim index, Dim block, Dim grid);
const char* name(WarpOp op);

}  // namespace simt
