// The race check. A race is two accesses of different threads to one word, at least one of them a write, that nothing
// orders.
//
// Within a block, __syncthreads orders all threads and a __syncwarp of the whole warp orders the warp's lanes. Shuffles
// and matrix instructions wait for each other's lanes but, by the CUDA programming guide, do not order memory. A
// copy_async writes at some time between its issue and the issuing thread's copy_wait: in between no thread may access
// the words, and earlier accesses must be ordered before the issue.
//
// Blocks are only ordered by counters: block X writes; a barrier orders these writes before a thread of X that
// announces; a thread of block Y waits for at least that many announcements; a barrier orders it before Y's accesses.
//
// Each 4-byte word stores its latest write and the latest reads since. One write is enough, because an earlier write
// that was not ordered before it has been reported. Within a block the reads of the latest epoch are enough; of the
// reads of several blocks, only those of the last block are stored.
#pragma once
#include "machine.h"

namespace cuda_on_cpu {

// A moment in the run of a thread. Epoch 0: never.
struct Moment {
  u32 epoch, warp_epoch;
  u16 thread;
};

enum Flags : u16 {
  PENDING = 1,       // a write that copy_wait has not finished
  SEVERAL_LANES = 2, // reads of more than one lane in this epoch of the warp
  SEVERAL_WARPS = 4, // reads of more than one warp in this epoch of the block
};

struct Access {
  Moment moment;
  u16 flags;
  u32 tag; // its place, as `tag_of` packs it
};

struct Word {
  Access write, read;
};

struct Announcement {
  const int *counter;
  int position; // the counter's value before the announcement
  Moment moment;
};

struct Acquisition {
  const int *counter;
  int value;
  Moment moment;
};

struct BlockHistory {
  u32 first_epoch;
  size_t announcements, acquisitions; // where the block's own begin
  uint3 index;
};

struct Races {
  bool checked = false;
  std::vector<const char *> files; // file names, by the tags' numbers
  std::vector<Word> shared;
  std::vector<Word *> buffers; // the words of each buffer; null if it is read-only
  std::vector<Announcement> announcements;
  std::vector<Acquisition> acquisitions;
  std::vector<BlockHistory> blocks;
};

static Races races;

// A place packed into 4 bytes: 8 bits for the file and 24 for the line.
inline u32 tag_of(Place place) {
  size_t file = 0;
  while (file < races.files.size() && races.files[file] != place.file)
    file++;
  if (file == races.files.size())
    races.files.push_back(place.file);
  return u32(file) << 24 | u32(place.line);
}
inline Place place_of(u32 tag) { return {races.files[tag >> 24], int(tag & 0xffffff)}; }

inline Moment now() {
  const Thread &thread = self();
  return {machine.epoch, machine.warps[size_t(thread.warp)].epoch, u16(thread.id)};
}

// Whether `before` is ordered before `after`, a later moment of the same block.
inline bool ordered(const Moment &before, const Moment &after) {
  return before.epoch != after.epoch || before.thread == after.thread ||
         (before.thread / 32 == after.thread / 32 && before.warp_epoch != after.warp_epoch);
}

// ---- between blocks

inline size_t block_of(u32 epoch) { // the last block that began at this epoch or before
  size_t low = 0, high = races.blocks.size();
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (races.blocks[middle].first_epoch <= epoch ? low : high) = middle;
  }
  return low;
}

template <class Event> size_t end_of(const std::vector<Event> &events, size_t BlockHistory::*begin, size_t block) {
  return block + 1 < races.blocks.size() ? races.blocks[block + 1].*begin : events.size();
}

// Whether `before` is ordered before `after`, which may be a moment of a later block.
inline bool ordered_by_counters(const Moment &before, const Moment &after) {
  const size_t earlier = block_of(before.epoch), later = block_of(after.epoch);
  if (earlier == later)
    return ordered(before, after);
  const size_t acquisitions_end = end_of(races.acquisitions, &BlockHistory::acquisitions, later);
  for (size_t i = races.blocks[later].acquisitions; i < acquisitions_end; i++) {
    const Acquisition &acquired = races.acquisitions[i];
    if (!ordered(acquired.moment, after) || acquired.moment.epoch > after.epoch)
      continue;
    auto covers = [&](const Announcement &a) {
      return a.counter == acquired.counter && a.position < acquired.value &&
             a.moment.epoch >= before.epoch;
    };
    const size_t begin = races.blocks[earlier].announcements;
    const size_t end = end_of(races.announcements, &BlockHistory::announcements, earlier);
    for (size_t j = begin; j < end; j++)
      if (covers(races.announcements[j]) && ordered(before, races.announcements[j].moment))
        return true;
    for (size_t j = end; j < races.blocks[later].announcements; j++) // through a third block
      if (covers(races.announcements[j]) && ordered_by_counters(before, races.announcements[j].moment))
        return true;
  }
  return false;
}

// ---- one word

[[noreturn]] inline void fail_race(const Access &before, const char *verb, const char *done, const char *what,
                                   long long offset, Place place) {
  const u32 first_epoch = races.blocks.back().first_epoch;
  const Place there = place_of(before.tag);
  char other[96];
  if (before.moment.epoch >= first_epoch)
    describe(other, sizeof other, *machine.threads[before.moment.thread]);
  else {
    const uint3 b = races.blocks[block_of(before.moment.epoch)].index;
    snprintf(other, sizeof other, "block (%u, %u, %u)", b.x, b.y, b.z);
  }
  const char *lack = before.flags & PENDING                 ? "and no copy_wait has finished it"
                     : before.moment.epoch >= first_epoch ? "and no barrier orders the two"
                                                          : "and no announcement waited for orders the two";
  fail(place, self(), "race: it %s byte %lld of %s, which %s %s at %s:%d, %s", verb, offset, what, other, done,
       base_name(there.file), there.line, lack);
}

inline bool happened_before(const Access &before, const Moment &moment) {
  if (before.moment.epoch == moment.epoch)
    return ordered(before.moment, moment);
  return before.moment.epoch == 0 || before.moment.epoch >= races.blocks.back().first_epoch ||
         ordered_by_counters(before.moment, moment);
}

inline void note_read(Word &word, const Moment &moment, u32 tag, const char *what, long long offset) {
  if ((word.write.flags & PENDING) || !happened_before(word.write, moment))
    fail_race(word.write, "reads", word.write.flags & PENDING ? "began to copy" : "wrote", what, offset, place_of(tag));
  Access &read = word.read;
  if (read.moment.epoch == moment.epoch) {
    if (read.moment.thread / 32 != moment.thread / 32) {
      read.flags |= SEVERAL_WARPS;
      return;
    }
    if (read.moment.warp_epoch == moment.warp_epoch) {
      if (read.moment.thread != moment.thread)
        read.flags |= SEVERAL_LANES;
      return;
    }
  }
  const bool same_epoch = read.moment.epoch == moment.epoch;
  read.flags = same_epoch ? read.flags & SEVERAL_WARPS : 0;
  read.moment = moment;
  read.tag = tag;
}

inline void note_write(Word &word, const Moment &moment, u32 tag, bool pending, const char *what, long long offset) {
  if ((word.write.flags & PENDING) || !happened_before(word.write, moment))
    fail_race(word.write, "writes", word.write.flags & PENDING ? "began to copy" : "wrote", what, offset,
              place_of(tag));
  const Access &read = word.read;
  const bool several = read.moment.epoch == moment.epoch &&
                       ((read.flags & SEVERAL_WARPS) ||
                        ((read.flags & SEVERAL_LANES) && read.moment.warp_epoch == moment.warp_epoch));
  if (several || !happened_before(read, moment))
    fail_race(read, "writes", several ? "read (and others)" : "read", what, offset, place_of(tag));
  word.write = {moment, u16(pending ? PENDING : 0), tag};
  word.read.moment.epoch = 0;
}

// ---- ranges of words

OUT_OF_LINE inline void note_shared(u32 offset, u32 bytes, bool write, Place place, bool pending = false) {
  const Moment moment = now();
  const u32 tag = tag_of(place);
  const u32 first_epoch = races.blocks.back().first_epoch;
  for (u32 i = offset / 4; i < (offset + bytes) / 4; i++) {
    Word &word = races.shared[i];
    if (word.write.moment.epoch < first_epoch && word.read.moment.epoch < first_epoch)
      word = {}; // another block's memory
    if (write)
      note_write(word, moment, tag, pending, "shared memory", i * 4ll);
    else
      note_read(word, moment, tag, "shared memory", i * 4ll);
  }
}

// Called by copy_wait: the copied words count as written now.
inline void note_copied(u32 offset, u32 bytes) {
  for (u32 word = offset / 4; word < (offset + bytes) / 4; word++) {
    Access &write = races.shared[word].write;
    write.moment = now();
    write.flags = 0;
  }
}

OUT_OF_LINE inline void note_global(Word *words, u64 offset, u32 bytes, bool write, const char *name, Place place) {
  const Moment moment = now();
  const u32 tag = tag_of(place);
  for (u64 word = offset / 4; word < (offset + bytes) / 4; word++)
    if (write)
      note_write(words[word], moment, tag, false, name, (long long)word * 4);
    else
      note_read(words[word], moment, tag, name, (long long)word * 4);
}

} // namespace cuda_on_cpu
