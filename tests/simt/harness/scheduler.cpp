// Fibers and block barriers; finds divergent barriers and deadlocks.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "engine.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the old stack and takes them from the new one.
extern "C" void simt_switch_stack(void** old_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");

// Storage of CUDA's built-in variables; the toolkit's headers declare them const. A fiber always
// sees its own threadIdx, so the compiler may keep it in a register across switches.
simt::Dim simt_thread_index asm("threadIdx"), simt_block_index asm("blockIdx"),
    simt_block_dim asm("blockDim"), simt_grid_dim asm("gridDim");
int simt_warp_size asm("warpSize") = 32;

namespace simt {

Engine engine;
Hooks hooks;
const Thread* self = nullptr;

namespace {

#if defined(SIMT_ASAN)
constexpr size_t kStackBytes = 256 * 1024;
const void* main_stack_bottom = nullptr;
size_t main_stack_bytes = 0;

void finish_asan_switch(void* fake_stack) {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  if (main_stack_bottom == nullptr) {  // the first switch of all comes from the main stack
    main_stack_bottom = bottom;
    main_stack_bytes = bytes;
  }
}
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

struct ExitThread {};

// Null means the scheduler's own stack.
void switch_stack(Fiber* from, Fiber* to) {
#if defined(SIMT_ASAN)
  void* fake_stack = nullptr;
  const bool ends = from != nullptr && from->state == State::kReturned;
  __sanitizer_start_switch_fiber(
      ends ? nullptr : &fake_stack,
      to != nullptr ? engine.stacks + engine.number(to) * engine.stack_bytes : main_stack_bottom,
      to != nullptr ? engine.stack_bytes : main_stack_bytes);
#endif
  engine.running = to;
  self = to != nullptr ? &to->thread : nullptr;
  if (to != nullptr) simt_thread_index = to->thread.index;
  simt_switch_stack(from != nullptr ? &from->stack_pointer : &engine.main_stack_pointer,
                    to != nullptr ? to->stack_pointer : engine.main_stack_pointer);
#if defined(SIMT_ASAN)
  finish_asan_switch(fake_stack);
#endif
}

Fiber* next_ready() {
  if (!engine.error.empty()) return nullptr;
  if (!engine.first.empty()) {
    const int thread = engine.first.back();
    engine.first.pop_back();
    return &engine.fibers[thread];
  }
  if (engine.queue_head == engine.queue.size()) return nullptr;
  return &engine.fibers[engine.queue[engine.queue_head++]];
}

void fiber_main() {
#if defined(SIMT_ASAN)
  finish_asan_switch(nullptr);
#endif
  Fiber* me = engine.running;
  try {
    try {
      (*engine.body)();
    } catch (const ExitThread&) {
    }
    --engine.num_live;
    if (!engine.at_barrier.empty()) {
      fail("a thread returned while others of its block wait at the barrier at " +
           text(engine.barrier_site));
    }
  } catch (const std::exception& error) {
    if (engine.error.empty()) engine.error = error.what();
  }
  me->state = State::kReturned;
  switch_to_next(me);
  abort();  // nobody resumes a thread that returned
}

void start_fiber(Fiber& fiber, int number, Dim block) {
  const unsigned linear = unsigned(number);
  char* stack = engine.stacks + size_t(number) * engine.stack_bytes;
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(stack, engine.stack_bytes);
#endif
  void** top = reinterpret_cast<void**>(stack + engine.stack_bytes);
  *--top = nullptr;  // the ABI wants the stack 16-byte aligned before a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.thread = {{linear % block.x, linear / block.x % block.y, linear / (block.x * block.y)},
                  linear,
                  linear / 32,
                  linear % 32};
  fiber.state = State::kReady;
  fiber.copies.clear();
  fiber.copy_group = 0;
}

[[noreturn]] void report_deadlock() {
  std::string message = "deadlock";
  const Fiber* last = nullptr;
  for (const Fiber& fiber : engine.fibers) {
    if (fiber.state == State::kReturned) continue;
    if (last == nullptr || last->state != fiber.state || last->site.line != fiber.site.line) {
      message += "; thread " + std::to_string(fiber.thread.linear) + " waits in " +
                 (fiber.state == State::kAtBarrier ? "barrier" : name(fiber.op)) + " at " +
                 text(fiber.site);
    }
    last = &fiber;
  }
  fail(message);
}

}  // namespace

std::string text(Site site) {
  const char* base = strrchr(site.file, '/');
  return (base != nullptr ? base + 1 : site.file) + (":" + std::to_string(site.line));
}

void fail(const std::string& message) {
  std::string where = std::string(" [") + engine.kernel_name;
  const auto add = [&](const char* what, unsigned value) { where += what + std::to_string(value); };
  add(", block ", engine.block_index.x);
  add(",", engine.block_index.y);
  add(",", engine.block_index.z);
  if (engine.running != nullptr) {
    add(", warp ", engine.running->thread.warp);
    add(" lane ", engine.running->thread.lane);
  }
  throw Error(message + where + "]");
}

void exit_thread() { throw ExitThread{}; }

void yield() {
  if (engine.running == nullptr) return;
  engine.queue.push_back(engine.number(engine.running));
  switch_to_next(engine.running);
}

void append_in_order(std::vector<int>& list, std::vector<int> threads) {
  std::sort(threads.begin(), threads.end());
  if (engine.order == 1) std::reverse(threads.begin(), threads.end());
  if (engine.order > 1) std::shuffle(threads.begin(), threads.end(), engine.random);
  list.insert(list.end(), threads.begin(), threads.end());
}

void switch_to_next(Fiber* me) {
  Fiber* next = next_ready();
  if (next != me) switch_stack(me, next);
}

int barrier(BarrierOp op, int predicate, Site site) {
  Fiber* me = engine.running;
  auto& waiting = engine.at_barrier;
  if (engine.num_live != engine.fibers.size()) {
    fail("barrier at " + text(site) + " after threads of the block returned");
  }
  if (waiting.empty()) {
    engine.barrier_op = op;
    engine.barrier_site = site;
  } else if (engine.barrier_op != op || engine.barrier_site.line != site.line ||
             strcmp(engine.barrier_site.file, site.file) != 0) {
    fail("divergent barrier: reached at " + text(engine.barrier_site) + " and at " + text(site));
  }
  me->state = State::kAtBarrier;
  me->predicate = predicate != 0;
  me->site = site;
  waiting.push_back(engine.number(me));
  if (waiting.size() == engine.num_live) {
    int count = 0;
    for (int thread : waiting) count += engine.fibers[thread].predicate;
    const int result = op == BarrierOp::kCount ? count
                       : op == BarrierOp::kAnd ? count == int(waiting.size())
                                               : count > 0;
    for (int thread : waiting) {
      engine.fibers[thread].state = State::kReady;
      engine.fibers[thread].barrier_result = result;
    }
    if (hooks.barrier != nullptr) hooks.barrier();
    append_in_order(engine.queue, waiting);
    waiting.clear();
  }
  switch_to_next(me);
  return me->barrier_result;
}

void reserve_stacks(size_t num_threads) {
  if (num_threads <= engine.num_stacks) return;
  if (engine.stacks != nullptr) munmap(engine.stacks, engine.num_stacks * kStackBytes);
  void* stacks = mmap(nullptr, num_threads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw Error("no memory for the stacks of the fibers");
  engine.stacks = static_cast<char*>(stacks);
  engine.stack_bytes = kStackBytes;
  engine.num_stacks = num_threads;
}

void run_block(Dim index, Dim block, Dim grid) {
  engine.block_index = simt_block_index = index;
  simt_block_dim = block;
  simt_grid_dim = grid;
  engine.num_live = engine.fibers.size();
  engine.first.clear();
  engine.queue.clear();
  engine.queue_head = 0;
  engine.at_barrier.clear();
  if (engine.shared_bytes > 0) memset(engine.shared, 0xff, engine.shared_bytes);  // poison: NaN
  if (hooks.block_begin != nullptr) hooks.block_begin(engine.shared_bytes);
  std::vector<int> threads(engine.fibers.size());
  std::iota(threads.begin(), threads.end(), 0);
  for (int thread : threads) start_fiber(engine.fibers[thread], thread, block);
  append_in_order(engine.queue, threads);
  while (Fiber* fiber = next_ready()) switch_stack(nullptr, fiber);
  if (!engine.error.empty()) throw Error(engine.error);
  if (engine.num_live > 0) report_deadlock();
}

unsigned char* dynamic_shared() { return engine.shared; }

extern "C" __attribute__((visibility("default"))) void simt_set_order(int64_t order) {
  engine.order = int(order);
}

bool on_fiber_stack(const void* address) {
  const auto* p = static_cast<const char*>(address);
  return p >= engine.stacks && p < engine.stacks + engine.num_stacks * engine.stack_bytes;
}

}  // namespace simt
