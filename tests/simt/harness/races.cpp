// Race and initialisation checker of the race build: kernels are compiled with -fsanitize=thread
// for its instrumentation only, and this file defines the __tsan_* calls in place of libtsan. Exact
// and deterministic, because there is one OS thread.
//
// Two accesses of a byte race when two threads made them, one of them wrote, not both were atomic,
// and neither a block barrier nor a __syncwarp naming both lies between; or when two blocks of one
// launch made them. Shuffles and other collectives order nothing, as on the GPU.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {
namespace {

struct Access {
  uint32_t thread, block, barrier, warp_clock;  // block 0: no access yet
  const void* pc;
  bool atomic;
};
// The last write and up to two reads by different threads since: enough to see every race once.
struct Cell {
  Access write, read, other_read;
};
constexpr uintptr_t kPageBits = 10;

struct Checker {
  std::unordered_map<uintptr_t, Cell*> pages;  // of the running launch
  uintptr_t last_page_number = ~uintptr_t(0);
  Cell* last_page = nullptr;
  uint32_t block = 0, barrier = 0;
  uint32_t warp_clock[32], last_full_sync[32];
  std::map<uint32_t, uint32_t> partial_sync;                    // (warp, lane, lane) -> clock
  const char *shared_begin = nullptr, *shared_end = nullptr;    // dynamic
  const char *statics_begin = nullptr, *statics_end = nullptr;  // of this library: __shared__
  std::set<std::pair<const void*, const void*>> seen;
  std::vector<std::string> reports;

  Cell& cell(uintptr_t address) {
    const uintptr_t number = address >> kPageBits;
    if (number != last_page_number) {
      Cell*& page = pages[number];
      if (page == nullptr) {
        page = static_cast<Cell*>(calloc(size_t(1) << kPageBits, sizeof(Cell)));
      }
      last_page_number = number;
      last_page = page;
    }
    return last_page[address & ((uintptr_t(1) << kPageBits) - 1)];
  }

  void begin_launch() {
    for (auto& [number, page] : pages) free(page);
    pages.clear();
    last_page_number = ~uintptr_t(0);
    block = 0;
    reports.clear();
    seen.clear();
  }
};
Checker checker;

bool in_dynamic_shared(const char* p) {
  return p >= checker.shared_begin && p < checker.shared_end;
}
bool in_shared(const char* p) {
  return in_dynamic_shared(p) || (p >= checker.statics_begin && p < checker.statics_end);
}

// Source lines of an address, innermost inlined function first.
std::string source_lines(const void* pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0) return "?";
  char command[1024];
  snprintf(command, sizeof command, "addr2line -e '%s' -i 0x%zx 2>/dev/null", info.dli_fname,
           size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1));
  std::string lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[1024];
    for (int n = 0; n < 3 && fgets(line, sizeof line, pipe) != nullptr; ++n) {
      line[strcspn(line, "\n(")] = 0;
      const char* base = strrchr(line, '/');
      lines += (n > 0 ? " < " : "") + std::string(base != nullptr ? base + 1 : line);
    }
    pclose(pipe);
  }
  return lines.empty() ? "?" : lines;
}

std::string describe(const Access& access, bool write) {
  return std::string(access.atomic ? "atomic " : "") + (write ? "write" : "read") + " by thread " +
         std::to_string(access.thread) + " of block #" + std::to_string(access.block - 1) + " at " +
         source_lines(access.pc);
}

void report_race(const char* p, const Access& a, bool a_writes, const Access& b, bool b_writes) {
  if (!checker.seen.insert({a.pc, b.pc}).second) return;
  checker.reports.push_back(std::string("race on ") + (in_shared(p) ? "shared" : "global") +
                            " memory: " + describe(a, a_writes) + "; " + describe(b, b_writes));
}

// Whether synchronisation puts `before` ahead of `now`.
bool ordered(const Access& before, const Access& now, bool shared) {
  if (before.block == 0) return true;
  if (before.block != now.block) return shared;  // another block's shared memory is another memory
  if (before.thread == now.thread || before.barrier < now.barrier) return true;
  const uint32_t warp = before.thread / 32;
  if (warp != now.thread / 32) return false;
  if (checker.last_full_sync[warp] > before.warp_clock) return true;
  const auto sync =
      checker.partial_sync.find(warp << 10 | (before.thread % 32) << 5 | now.thread % 32);
  return sync != checker.partial_sync.end() && sync->second > before.warp_clock;
}

void check(const void* address, size_t bytes, bool write, bool atomic, void* pc) {
  // The linker may give this file the kernels' instrumented copy of an inline function.
  static bool checking = false;
  if (checking || self == nullptr || on_fiber_stack(address)) return;
  checking = true;
  const auto* begin = static_cast<const char*>(address);
  const bool shared = in_shared(begin), dynamic = in_dynamic_shared(begin);
  const Access now{self->linear, checker.block, checker.barrier, checker.warp_clock[self->warp],
                   pc,           atomic};
  const auto races = [&](const Access& before) {
    return !ordered(before, now, shared) && !(before.atomic && atomic);
  };
  for (const char* p = begin; p < begin + bytes; ++p) {
    Cell& cell = checker.cell(reinterpret_cast<uintptr_t>(p));
    if (dynamic && !write && cell.write.block != now.block &&
        checker.seen.insert({pc, nullptr}).second) {
      checker.reports.push_back("shared memory never written in this block: " +
                                describe(now, false));
    }
    if (races(cell.write)) report_race(p, cell.write, true, now, write);
    if (write) {
      if (races(cell.read)) report_race(p, cell.read, false, now, true);
      if (races(cell.other_read)) report_race(p, cell.other_read, false, now, true);
      cell.write = now;
    } else {
      const auto replaceable = [&](const Access& read) {
        return (read.thread == now.thread && read.block == now.block) || ordered(read, now, shared);
      };
      if (replaceable(cell.read)) {
        cell.read = now;
      } else if (replaceable(cell.other_read)) {
        cell.other_read = now;
      }
    }
  }
  checking = false;
}

void end_launch() {
  if (checker.reports.empty()) return;
  std::string message;
  for (const std::string& report : checker.reports) message += report + "\n";
  throw Error(message);
}

int find_statics(dl_phdr_info* library, size_t, void*) {
  const auto* me = reinterpret_cast<const char*>(&checker);
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& segment = library->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(library->dlpi_addr + segment.p_vaddr);
    if (segment.p_type == PT_LOAD && me >= begin && me < begin + segment.p_memsz) {
      checker.statics_begin = begin;
      checker.statics_end = begin + segment.p_memsz;
    }
  }
  return 0;
}

const bool installed = [] {
  dl_iterate_phdr(find_statics, nullptr);
  hooks.access = check;
  hooks.launch_begin = [] { checker.begin_launch(); };
  hooks.launch_end = end_launch;
  hooks.block_begin = [](size_t dynamic_bytes) {
    ++checker.block;
    checker.barrier = 0;
    memset(checker.warp_clock, 0, sizeof checker.warp_clock);
    memset(checker.last_full_sync, 0, sizeof checker.last_full_sync);
    checker.partial_sync.clear();
    checker.shared_begin = reinterpret_cast<const char*>(dynamic_shared());
    checker.shared_end = checker.shared_begin + dynamic_bytes;
  };
  hooks.barrier = [] { ++checker.barrier; };
  hooks.warp_sync = [](unsigned warp, unsigned mask) {
    const uint32_t clock = ++checker.warp_clock[warp];
    if (mask == ~0u) {
      checker.last_full_sync[warp] = clock;
      return;
    }
    for (unsigned a = 0; a < 32; ++a) {
      for (unsigned b = 0; b < 32; ++b) {
        if (mask >> a & mask >> b & 1) checker.partial_sync[warp << 10 | a << 5 | b] = clock;
      }
    }
  };
  return true;
}();

}  // namespace
}  // namespace simt

#define SIMT_PC __builtin_return_address(0)
#define SIMT_TSAN(N)                                                                   \
  void __tsan_read##N(void* p) { simt::check(p, N, false, false, SIMT_PC); }           \
  void __tsan_write##N(void* p) { simt::check(p, N, true, false, SIMT_PC); }           \
  void __tsan_unaligned_read##N(void* p) { simt::check(p, N, false, false, SIMT_PC); } \
  void __tsan_unaligned_write##N(void* p) { simt::check(p, N, true, false, SIMT_PC); } \
  void __tsan_volatile_read##N(void* p) { simt::check(p, N, false, true, SIMT_PC); }   \
  void __tsan_volatile_write##N(void* p) { simt::check(p, N, true, true, SIMT_PC); }
// std::atomic of host code in the same file (CUB's dispatch).
#define SIMT_TSAN_ATOMIC(N, T)                                                                    \
  T __tsan_atomic##N##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); }           \
  void __tsan_atomic##N##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); }           \
  T __tsan_atomic##N##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); } \
  T __tsan_atomic##N##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); } \
  int __tsan_atomic##N##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) {            \
    return __atomic_compare_exchange_n(p, e, v, 0, 5, 5);                                         \
  }                                                                                               \
  T __tsan_atomic##N##_compare_exchange_val(volatile T* p, T e, T v, int, int) {                  \
    __atomic_compare_exchange_n(p, &e, v, 0, 5, 5);                                               \
    return e;                                                                                     \
  }
extern "C" {
SIMT_TSAN(1)
SIMT_TSAN(2)
SIMT_TSAN(4)
SIMT_TSAN(8)
SIMT_TSAN(16)
SIMT_TSAN_ATOMIC(8, uint8_t)
SIMT_TSAN_ATOMIC(32, uint32_t)
SIMT_TSAN_ATOMIC(64, uint64_t)
void __tsan_read_range(void* p, size_t n) { simt::check(p, n, false, false, SIMT_PC); }
void __tsan_write_range(void* p, size_t n) { simt::check(p, n, true, false, SIMT_PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  simt::check(from, n, false, false, SIMT_PC);
  simt::check(to, n, true, false, SIMT_PC);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  simt::check(from, n, false, false, SIMT_PC);
  simt::check(to, n, true, false, SIMT_PC);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, size_t n) {
  simt::check(to, n, true, false, SIMT_PC);
  return memset(to, value, n);
}
}
