// The SIMT harness runs CUDA kernels on the CPU, so that their logic is tested where no GPU is: the
// kernel sources are compiled by the host compiler, every CUDA thread is a fiber (a function with a
// stack of its own), blocks run one after another, and a fiber hands over only where CUDA threads
// meet: barriers and warp collectives. So races and wrong synchronisation are found
// deterministically; the GPU's speed, rounding and weak memory order are not modelled.
//
// This header is the whole interface between the CUDA vocabulary (cuda_words.h) and the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim {
  unsigned x, y, z;
};

// A place in the kernel's source. As a default argument, here() names the caller's line.
struct Site {
  const char* file = "?";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
std::string text(Site site);

struct Thread {
  Dim index;
  unsigned linear;  // within the block
  unsigned warp, lane;
};
extern const Thread* self;  // the running thread; null outside kernels

// Ends the kernel with an error that names the running thread.
[[noreturn]] void fail(const std::string& message);
[[noreturn]] void exit_thread();
void yield();  // lets other threads run inside a spin loop

enum class BarrierOp : uint8_t { kSync, kCount, kAnd, kOr };
int barrier(BarrierOp op, int predicate, Site site);

enum class WarpOp : uint8_t {
  kShuffleIndex,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kMatchAny,
  kSync,
  kAdd,
  kMin,
  kMax,
  kMinSigned,
  kMaxSigned,
  kAnd,
  kOr,
  kXor,
  kExchange,
};
struct WarpResult {
  uint64_t value;
  bool in_range;  // PTX: the shuffle's source lane lies in its segment
};
// Every lane of `mask` must arrive with the same op and mask. b and c are PTX's operands of shfl.
WarpResult warp_collective(WarpOp op, unsigned mask, uint64_t value, int b, int c, Site site);
// All 32 lanes meet; the last to arrive calls `complete` with every lane's payload (mma, ldmatrix).
using Complete = void (*)(void* const payloads[32]);
void warp_exchange(void* payload, Complete complete, Site site);

unsigned char* dynamic_shared();
// An access that the harness makes for the running thread: checks bounds, tells the race checker.
void shared_access(const void* address, size_t bytes, bool write);

// cp.async: data lands when it is waited for, and not before, so that a missing wait reads poison.
void async_copy16(void* shared, const void* global, bool valid, Site site);
void async_commit();
void async_wait(int groups_left);

void launch(const char* name, const void* kernel, Dim grid, Dim block, size_t dynamic_bytes,
            const std::function<void()>& body);
// As on the GPU: more than 48 KiB of dynamic shared memory must be asked for.
void allow_dynamic_shared(const void* kernel, size_t bytes);

// Sets the order in which threads and blocks run: 0 ascending, 1 descending, others a random seed.
// Exported from every library, for Python (plugin.py).
extern "C" void simt_set_order(int64_t order);

bool on_fiber_stack(const void* address);

// What the race checker (races.cpp, only in its build) listens to.
struct Hooks {
  void (*launch_begin)() = nullptr;
  void (*launch_end)() = nullptr;
  void (*block_begin)(size_t dynamic_bytes) = nullptr;
  void (*barrier)() = nullptr;
  void (*warp_sync)(unsigned warp, unsigned mask) = nullptr;
  void (*access)(const void* address, size_t bytes, bool write, bool atomic, void* pc) = nullptr;
};
extern Hooks hooks;

}  // namespace simt
