// The machine: runs one block at a time, whose threads take turns; barriers, warp collectives and failures.
//
// A thread runs until it has to wait: at __syncthreads for the block, in a collective for the lanes of its mask. Then
// the next ready thread runs: the first one (forward), the last one (reverse) or a random one (by a seed). The lane
// that arrives last computes a collective for all lanes. A failure aborts the launch.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <vector>

#include "fibers.h"
#include "language.h"

namespace cuda_on_cpu {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// The place of an operation in the kernel's source, passed as a default argument to every operation.
struct Place {
  const char *file;
  int line;
};
constexpr Place here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
inline bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

enum Order { FORWARD, REVERSE, RANDOM };

// A copy_async that has been issued but not waited for yet.
struct Copy {
  char *to;
  const void *from;
  bool valid;
};

struct Thread {
  Stack stack;
  uint3 index;
  int id, lane, warp;
  const char *operation; // the operation that it waits in, or waited in last, and its place
  Place place;
  std::vector<Copy> copies;
  std::vector<size_t> groups; // the ends, in `copies`, of the groups committed
};

using Compute = void (*)(void **arguments, u32 lanes, Place place);

struct Collective {
  u32 mask, arrived;
  Compute compute;
  const char *operation;
  bool whole; // an instruction for all 32 lanes: none may have left the kernel
  Place place;
  void *arguments[32];
};

struct Warp {
  int first;       // id of its lane 0
  u32 ready, live; // lanes that can run; lanes that have not left the kernel
  u32 born;        // lanes that exist in the block
  u32 epoch;       // number of barriers of the whole warp so far
  std::vector<Collective> collectives;
};

struct Machine {
  std::vector<Thread *> threads; // reused by later launches
  std::vector<Warp> warps;
  u32 ready_warps = 0;
  int size = 0, live = 0, at_barrier = 0;
  u32 epoch = 0; // number of barriers of whole blocks, and of blocks begun, so far in the launch
  Place barrier{};
  Thread *current = nullptr; // null: outside the kernel
  Stack main;
  Order order = FORWARD;
  u64 random = 1;
  void (*body)() = nullptr;
  bool failed = false;
  char message[1024];
};

static Machine machine;

} // namespace cuda_on_cpu

// The built-in variables; threadIdx is set whenever a thread is resumed.
static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

inline Thread &self() { return *machine.current; }

// ---- failures

inline int describe(char *text, size_t bytes, const Thread &thread) {
  return snprintf(text, bytes, "thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
}

inline const char *base_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

inline void record(Place place, const Thread *thread, const char *format, va_list values) {
  if (machine.failed)
    return;
  machine.failed = true;
  char *text = machine.message;
  size_t room = sizeof machine.message;
  auto advance = [&](int written) {
    const size_t step = written < 0 ? 0 : size_t(written) < room ? size_t(written) : room - 1;
    text += step;
    room -= step;
  };
  advance(vsnprintf(text, room, format, values));
  if (place.file)
    advance(snprintf(text, room, ", at %s:%d", base_name(place.file), place.line));
  advance(snprintf(text, room, ", block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z));
  if (thread) {
    advance(snprintf(text, room, ", "));
    advance(describe(text, room, *thread));
  }
}

// Ends the launch with a message; called on a thread's stack.
[[noreturn]] __attribute__((format(printf, 3, 4))) inline void fail(Place place, const Thread &thread,
                                                                    const char *format, ...) {
  va_list values;
  va_start(values, format);
  record(place, &thread, format, values);
  va_end(values);
  resume(self().stack, machine.main, true);
  __builtin_unreachable();
}

// Records a failure while no thread runs; the caller has to return.
__attribute__((format(printf, 1, 2))) inline void fail_block(const char *format, ...) {
  va_list values;
  va_start(values, format);
  record({nullptr, 0}, nullptr, format, values);
  va_end(values);
}

// ---- turns

inline u64 next_random() { // xorshift64
  u64 &x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

inline int choose_bit(u32 bits) {
  if (machine.order == FORWARD)
    return __builtin_ctz(bits);
  if (machine.order == REVERSE)
    return 31 - __builtin_clz(bits);
  for (u64 skip = (next_random() >> 32) * u64(__builtin_popcount(bits)) >> 32; skip > 0; skip--)
    bits &= bits - 1;
  return __builtin_ctz(bits);
}

// Chooses the next of the ready threads and marks it as running; null if no thread is ready.
inline Thread *next_ready() {
  if (!machine.ready_warps)
    return nullptr;
  const int w = choose_bit(machine.ready_warps);
  Warp &warp = machine.warps[size_t(w)];
  const int lane = choose_bit(warp.ready);
  warp.ready &= ~(1u << lane);
  if (!warp.ready)
    machine.ready_warps &= ~(1u << w);
  return machine.threads[size_t(warp.first + lane)];
}

inline void make_ready(Warp &warp, u32 lanes) {
  warp.ready |= lanes;
  machine.ready_warps |= 1u << (warp.first / 32);
}

// Called when every thread waits for another one: reports which.
[[noreturn]] inline void fail_deadlock() {
  for (Warp &warp : machine.warps)
    for (Collective &collective : warp.collectives) {
      const u32 missing = collective.mask & warp.live & ~collective.arrived;
      const Thread &waits = *machine.threads[size_t(warp.first + __builtin_ctz(collective.arrived))];
      const Thread &lacks = *machine.threads[size_t(warp.first + __builtin_ctz(missing))];
      fail(collective.place, waits,
           "%s is never reached by lanes 0x%08x of its mask 0x%08x (lane %d waits in %s at %s:%d)",
           collective.operation, missing, collective.mask, lacks.lane, lacks.operation, base_name(lacks.place.file),
           lacks.place.line);
    }
  // A missing __syncthreads is not reported here: it fails where the missing thread leaves the kernel.
  fail(machine.barrier, self(), "deadlock");
}

inline void take_turn(Thread &thread) {
  machine.current = &thread;
  threadIdx = thread.index;
}

// Lets others run until this thread is ready and chosen again.
inline void wait_for_turn() {
  Thread &thread = self();
  Thread *next = next_ready();
  if (!next)
    fail_deadlock();
  if (next != &thread) {
    machine.current = next;
    resume(thread.stack, next->stack);
  }
  take_turn(thread);
}

// ---- warp collectives

inline void (*after_collective)(Warp &) = nullptr; // set while shared accesses are counted

inline void finish_if_complete(Warp &warp, size_t which) {
  Collective &collective = warp.collectives[which];
  if ((collective.mask & warp.live & ~collective.arrived) != 0)
    return;
  collective.compute(collective.arguments, collective.arrived, collective.place);
  make_ready(warp, collective.arrived);
  if (after_collective)
    after_collective(warp);
  if (which + 1 != warp.collectives.size())
    collective = warp.collectives.back();
  warp.collectives.pop_back();
}

// Waits for the lanes of `mask` that have not left the kernel; `compute` then runs once, on the arguments of all lanes.
OUT_OF_LINE inline void warp_collective(u32 mask, Compute compute, void *argument, const char *operation, Place place,
                            bool whole = false) {
  Thread &thread = self();
  Warp &warp = machine.warps[size_t(thread.warp)];
  const u32 bit = 1u << thread.lane;
  mask &= warp.born;
  if (!(mask & bit))
    fail(place, thread, "%s: lane %d is not in its mask 0x%08x", operation, thread.lane, mask);
  size_t which = 0;
  for (; which < warp.collectives.size(); which++) {
    const Collective &other = warp.collectives[which];
    if (other.mask == mask && other.compute == compute && same(other.place, place))
      break;
    if ((other.mask & bit) && (other.arrived & mask)) // each waits for the other
      fail(place, thread, "%s with mask 0x%08x, while lanes 0x%08x of the warp are in %s with mask 0x%08x at %s:%d",
           operation, mask, other.arrived, other.operation, other.mask, base_name(other.place.file), other.place.line);
  }
  if (which == warp.collectives.size()) {
    warp.collectives.emplace_back();
    Collective &fresh = warp.collectives.back();
    fresh.mask = mask;
    fresh.arrived = 0;
    fresh.compute = compute;
    fresh.operation = operation;
    fresh.whole = whole;
    fresh.place = place;
  }
  Collective &collective = warp.collectives[which];
  collective.arguments[thread.lane] = argument;
  collective.arrived |= bit;
  thread.operation = operation;
  thread.place = place;
  finish_if_complete(warp, which);
  wait_for_turn();
}

// A collective of an instruction that all 32 lanes must execute together.
inline void whole_warp_collective(Compute compute, void *argument, const char *operation, Place place) {
  const Warp &warp = machine.warps[size_t(self().warp)];
  if (warp.live != ~0u)
    fail(place, self(), "%s needs all 32 lanes, and lanes 0x%08x have left the kernel or do not exist", operation,
         ~warp.live);
  warp_collective(~0u, compute, argument, operation, place, true);
}

// ---- the barrier of the block

OUT_OF_LINE inline void block_barrier(Place place) {
  Thread &thread = self();
  if (machine.live < machine.size)
    fail(place, thread, "__syncthreads is not reached by %d threads that have left the kernel",
         machine.size - machine.live);
  if (machine.at_barrier && !same(place, machine.barrier))
    fail(place, thread, "__syncthreads, while other threads of the block wait in another one at %s:%d",
         base_name(machine.barrier.file), machine.barrier.line);
  machine.barrier = place;
  thread.operation = "__syncthreads";
  thread.place = place;
  if (++machine.at_barrier == machine.size) {
    machine.at_barrier = 0;
    machine.epoch++;
    for (Warp &warp : machine.warps) {
      make_ready(warp, warp.born);
      if (after_collective)
        after_collective(warp);
    }
  }
  wait_for_turn();
}

// ---- the life of a thread and of a block

[[noreturn]] inline void leave() {
  Thread &thread = self();
  Warp &warp = machine.warps[size_t(thread.warp)];
  if (machine.at_barrier)
    fail(machine.barrier, thread, "__syncthreads is never reached by a thread that leaves the kernel");
  warp.live &= ~(1u << thread.lane);
  machine.live--;
  for (size_t which = warp.collectives.size(); which-- > 0;) {
    const Collective &waiting = warp.collectives[which];
    if (!(waiting.mask >> thread.lane & 1))
      continue;
    if (waiting.whole)
      fail(waiting.place, thread, "%s needs all 32 lanes, and lane %d leaves the kernel", waiting.operation,
           thread.lane);
    finish_if_complete(warp, which);
  }
  if (!warp.live && after_collective)
    after_collective(warp);
  Thread *next = next_ready();
  if (!next && machine.live)
    fail_deadlock();
  machine.current = next;
  resume(thread.stack, next ? next->stack : machine.main, true);
  __builtin_unreachable();
}

inline void thread_main() {
  entered(machine.main);
  take_turn(self());
  machine.body();
  leave();
}

// Runs the threads of block blockIdx; returns false if it failed.
inline bool run_block() {
  const int size = int(blockDim.x * blockDim.y * blockDim.z);
  while (int(machine.threads.size()) < size) {
    Thread *thread = new Thread;
    if (!allocate(thread->stack)) {
      fail_block("no memory for the stacks of %d threads", size);
      return false;
    }
    machine.threads.push_back(thread);
  }
  machine.size = machine.live = size;
  machine.at_barrier = 0;
  machine.epoch++;
  machine.ready_warps = 0;
  machine.warps.resize(size_t(size + 31) / 32);
  for (int id = 0; id < size; id++) {
    Thread &thread = *machine.threads[size_t(id)];
    thread.id = id;
    thread.lane = id % 32;
    thread.warp = id / 32;
    thread.index = {id % blockDim.x, id / blockDim.x % blockDim.y, id / (blockDim.x * blockDim.y)};
    thread.operation = "no operation";
    thread.place = {"", 0};
    thread.copies.clear();
    thread.groups.clear();
    prepare(thread.stack, thread_main, id);
  }
  for (size_t w = 0; w < machine.warps.size(); w++) {
    Warp &warp = machine.warps[w];
    const int lanes = size - int(w) * 32;
    warp.first = int(w) * 32;
    warp.born = warp.live = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warp.ready = 0;
    warp.collectives.clear();
    make_ready(warp, warp.born);
  }
  Thread *first = next_ready();
  machine.current = first;
  resume(machine.main, first->stack);
  machine.current = nullptr;
  return !machine.failed;
}

} // namespace cuda_on_cpu
