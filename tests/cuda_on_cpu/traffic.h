// Counters of a launch: bytes, matrix multiplications, and the wavefronts of shared memory.
//
// A wavefront is one cycle of shared memory, which reads or writes a 4-byte word in each of the 32 banks (word w lies
// in bank w % 32); lanes that access the same word share it. A warp's access is split into phases of 128 bytes: 32
// lanes of 4 bytes, 16 of 8, or 8 of 16 (one row of each lane for a matrix load). A phase takes as many wavefronts as
// there are different words in its busiest bank; all wavefronts beyond the first are conflicts.
//
// Plain loads, stores and copies are counted later, because the lanes of a warp do not run together here: each thread
// logs its accesses, and at each barrier or collective of the warp, the n-th accesses of all lanes by one source line
// since the last barrier or collective are counted as one warp-wide access. The hardware does the same, provided that
// the lanes of a warp may leave a loop at different times but do not skip iterations in the middle of it.
#pragma once
#include <algorithm>
#include <tuple>

#include "machine.h"

namespace cuda_on_cpu {

enum Kind { MATRIX_LOAD, LOAD, STORE, COPY, KINDS };

struct Counts {
  u64 bytes_read, bytes_written, matrix_multiplies;
  u64 wavefronts[KINDS], conflicts[KINDS];
};

struct SharedAccess {
  u32 kind, bytes, tag, turn; // equal in the lanes of one warp-wide access
  u32 lane, offset;
};

struct Traffic {
  bool detailed = false; // count wavefronts too
  Counts counts{};
  std::vector<std::vector<SharedAccess>> logs; // a log for each warp
};

static Traffic traffic;

inline void count_phase(Kind kind, const u32 *offsets, int lanes, u32 bytes) {
  u32 words[32], in_bank[32] = {};
  int different = 0;
  u32 wavefronts = 0;
  for (int lane = 0; lane < lanes; lane++)
    for (u32 word = offsets[lane] / 4; word < (offsets[lane] + bytes) / 4; word++) {
      bool known = false;
      for (int i = 0; i < different && !known; i++)
        known = words[i] == word;
      if (known)
        continue;
      words[different++] = word;
      wavefronts = std::max(wavefronts, ++in_bank[word % 32]);
    }
  traffic.counts.wavefronts[kind] += wavefronts;
  traffic.counts.conflicts[kind] += wavefronts - 1;
}

OUT_OF_LINE inline void log_shared(Kind kind, u32 offset, u32 bytes, u32 tag) {
  const Thread &thread = self();
  traffic.logs[size_t(thread.warp)].push_back({kind, bytes, tag, 0, u32(thread.lane), offset});
}

// Counts what the lanes of a warp have logged.
OUT_OF_LINE inline void count_log(Warp &warp) {
  std::vector<SharedAccess> &log = traffic.logs[size_t(warp.first / 32)];
  if (log.empty())
    return;
  auto instruction = [](const SharedAccess &a) { return std::make_tuple(a.kind, a.bytes, a.tag); };
  std::stable_sort(log.begin(), log.end(), [&](const SharedAccess &a, const SharedAccess &b) {
    return std::make_tuple(instruction(a), a.lane) < std::make_tuple(instruction(b), b.lane);
  });
  for (size_t i = 1; i < log.size(); i++)
    if (instruction(log[i]) == instruction(log[i - 1]) && log[i].lane == log[i - 1].lane)
      log[i].turn = log[i - 1].turn + 1;
  auto phase = [&](const SharedAccess &a) {
    return std::make_tuple(instruction(a), a.turn, a.lane / (128 / a.bytes));
  };
  std::stable_sort(log.begin(), log.end(),
                   [&](const SharedAccess &a, const SharedAccess &b) { return phase(a) < phase(b); });
  for (size_t begin = 0, end; begin < log.size(); begin = end) {
    u32 offsets[32];
    int lanes = 0;
    for (end = begin; end < log.size() && phase(log[end]) == phase(log[begin]); end++)
      offsets[lanes++] = log[end].offset;
    count_phase(Kind(log[begin].kind), offsets, lanes, log[begin].bytes);
  }
  log.clear();
}

} // namespace cuda_on_cpu
