// Where the lanes of a warp meet: shuffles, votes, reductions, exchanges; and cp.async.
#include <algorithm>
#include <cstring>

#include "engine.h"

namespace simt {
namespace {

// PTX's shfl: c holds the clamp (bits 0-4) and the segment mask (bits 8-12).
void shuffle(Fiber* warp, int lane, unsigned mask) {
  Fiber& me = warp[lane];
  const int segment = me.c >> 8 & 31, clamp = me.c & 31, b = me.b & 31;
  const int last = (lane & segment) | (clamp & ~segment);
  int source = lane ^ b;
  if (me.op == WarpOp::kShuffleIndex) source = (lane & segment) | (b & ~segment);
  if (me.op == WarpOp::kShuffleUp) source = lane - b;
  if (me.op == WarpOp::kShuffleDown) source = lane + b;
  const bool in_range = me.op == WarpOp::kShuffleUp ? source >= last : source <= last;
  if (!in_range) source = lane;
  if ((mask >> source & 1) == 0) {
    fail(std::string(name(me.op)) + " reads lane " + std::to_string(source) +
         ", which is not in the mask, at " + text(me.site));
  }
  me.result = {warp[source].value, in_range};
}

uint32_t combine(WarpOp op, uint32_t a, uint32_t b) {
  switch (op) {
    case WarpOp::kAdd:
      return a + b;
    case WarpOp::kMin:
      return std::min(a, b);
    case WarpOp::kMax:
      return std::max(a, b);
    case WarpOp::kMinSigned:
      return uint32_t(std::min(int32_t(a), int32_t(b)));
    case WarpOp::kMaxSigned:
      return uint32_t(std::max(int32_t(a), int32_t(b)));
    case WarpOp::kAnd:
      return a & b;
    case WarpOp::kOr:
      return a | b;
    default:
      return a ^ b;
  }
}

void complete(Fiber* warp, unsigned mask, WarpOp op) {
  std::vector<int> lanes;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) lanes.push_back(lane);
  }
  const auto same_value = [&](int lane) {
    unsigned same = 0;
    for (int other : lanes) same |= unsigned(warp[other].value == warp[lane].value) << other;
    return same;
  };
  if (op <= WarpOp::kShuffleXor) {
    for (int lane : lanes) shuffle(warp, lane, mask);
  } else if (op == WarpOp::kBallot) {
    unsigned votes = 0;
    for (int lane : lanes) votes |= unsigned(warp[lane].value != 0) << lane;
    for (int lane : lanes) warp[lane].result.value = votes;
  } else if (op == WarpOp::kMatchAny) {
    for (int lane : lanes) warp[lane].result.value = same_value(lane);
  } else if (op == WarpOp::kExchange) {
    void* payloads[32];
    for (int lane = 0; lane < 32; ++lane) payloads[lane] = warp[lane].payload;
    warp[0].complete(payloads);
  } else if (op == WarpOp::kSync) {
    if (hooks.warp_sync != nullptr) hooks.warp_sync(warp->thread.warp, mask);
  } else {
    uint32_t total = uint32_t(warp[lanes[0]].value);
    for (size_t i = 1; i < lanes.size(); ++i) {
      total = combine(op, total, uint32_t(warp[lanes[i]].value));
    }
    for (int lane : lanes) warp[lane].result.value = total;
  }
}

void meet(Fiber* me, WarpOp op, unsigned mask, Site site) {
  Fiber* warp = me - me->thread.lane;
  const size_t num_lanes = engine.fibers.size() - me->thread.warp * 32;
  const unsigned existing = num_lanes >= 32 ? ~0u : (1u << num_lanes) - 1;
  const auto what = [&] { return std::string(name(op)) + " at " + text(site); };
  if ((mask >> me->thread.lane & 1) == 0) fail(what() + ": the calling lane is not in its mask");
  if (mask & ~existing) fail(what() + ": the mask names lanes beyond the end of the block");
  me->op = op;
  me->mask = mask;
  me->site = site;
  me->state = State::kInCollective;
  bool all_here = true;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Fiber& other = warp[lane];
    if (other.state == State::kReturned) {
      fail(what() + " waits for lane " + std::to_string(lane) + ", which has returned");
    }
    if (other.state != State::kInCollective) {
      all_here = false;
    } else if (other.mask != mask || other.op != op) {
      fail("lanes of one warp meet in different collectives: " + what() + " and " + name(other.op) +
           " at " + text(other.site));
    }
  }
  if (!all_here) return switch_to_next(me);
  complete(warp, mask, op);
  std::vector<int> released;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    warp[lane].state = State::kReady;
    if (warp + lane != me) released.push_back(engine.number(warp + lane));
  }
  append_in_order(engine.first, std::move(released));
}

}  // namespace

const char* name(WarpOp op) {
  static const char* names[] = {"shfl.idx", "shfl.up", "shfl.down", "shfl.xor",
                                "ballot",   "match",   "syncwarp",  "red.add",
                                "red.min",  "red.max", "red.min",   "red.max",
                                "red.and",  "red.or",  "red.xor",   "warp exchange"};
  return names[int(op)];
}

WarpResult warp_collective(WarpOp op, unsigned mask, uint64_t value, int b, int c, Site site) {
  Fiber* me = engine.running;
  me->value = value;
  me->b = b;
  me->c = c;
  meet(me, op, mask, site);
  return me->result;
}

void warp_exchange(void* payload, Complete complete, Site site) {
  engine.running->payload = payload;
  engine.running->complete = complete;
  meet(engine.running, WarpOp::kExchange, ~0u, site);
}

void shared_access(const void* address, size_t bytes, bool write) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < engine.shared || p + bytes > engine.shared + engine.shared_bytes) {
    fail("access outside dynamic shared memory");
  }
  if (hooks.access != nullptr) {
    hooks.access(address, bytes, write, false, __builtin_return_address(0));
  }
}

void async_copy16(void* shared, const void* global, bool valid, Site site) {
  const auto misaligned = [](const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) != 0; };
  if (misaligned(shared) || (valid && misaligned(global))) {
    fail("cp.async of a misaligned address at " + text(site));
  }
  shared_access(shared, 16, true);
  if (valid && hooks.access != nullptr) {
    hooks.access(global, 16, false, false, __builtin_return_address(0));
  }
  engine.running->copies.push_back({shared, global, valid, engine.running->copy_group});
  memset(shared, 0xff, 16);
}

void async_commit() { ++engine.running->copy_group; }

void async_wait(int groups_left) {
  auto& copies = engine.running->copies;
  auto copy = copies.begin();
  for (; copy != copies.end() && copy->group < engine.running->copy_group - groups_left; ++copy) {
    shared_access(copy->shared, 16, true);
    if (copy->valid) {
      memcpy(copy->shared, copy->global, 16);
    } else {
      memset(copy->shared, 0, 16);
    }
  }
  copies.erase(copies.begin(), copy);
}

}  // namespace simt
