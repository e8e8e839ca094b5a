// The memory of the kernels: the block's dynamic shared memory and the launch's buffers, with every access checked.
#pragma once
#include <cstdlib>
#include <new>

#include "machine.h"
#include "races.h"
#include "traffic.h"

namespace cuda_on_cpu {

// An array that the launch may access.
struct Buffer {
  const char *name;
  char *address;
  u64 bytes;
  u32 writable;
};

struct Memory {
  static constexpr size_t LARGEST = 227 << 10; // dynamic shared memory of a block on sm_90
  static constexpr size_t GUARD = 4096;        // bytes of a guard, one on each side of the shared memory
  static constexpr unsigned char GUARD_BYTE = 0xc5;
  char *block = nullptr; // GUARD, the shared memory, GUARD up to the end
  char *shared = nullptr;
  size_t shared_bytes = 0;
  const Buffer *buffers = nullptr;
  int number = 0;
  int latest = 0; // the buffer of the latest access, tried first
};

static Memory memory;

// ---- shared memory

inline void poison_guards(bool poison) {
  (void)poison;
#ifdef __SANITIZE_ADDRESS__
  char *end = memory.shared + memory.shared_bytes;
  char *block_end = memory.block + Memory::LARGEST + 2 * Memory::GUARD;
  if (poison) {
    __asan_poison_memory_region(memory.block, Memory::GUARD);
    __asan_poison_memory_region(end, size_t(block_end - end));
  } else
    __asan_unpoison_memory_region(memory.block, size_t(block_end - memory.block));
#endif
}

inline void prepare_shared_memory(size_t bytes) {
  if (!memory.block)
    memory.block = (char *)aligned_alloc(1024, Memory::LARGEST + 2 * Memory::GUARD);
  memory.shared = memory.block + Memory::GUARD;
  memory.shared_bytes = bytes;
  poison_guards(false);
  memset(memory.block, Memory::GUARD_BYTE, Memory::GUARD);
  memset(memory.shared + bytes, Memory::GUARD_BYTE, Memory::GUARD);
  poison_guards(true);
}

// Fills shared memory with bytes 0xff: NaN in every format, so that a read of an element that was not written shows.
inline void clear_shared_memory() { memset(memory.shared, 0xff, memory.shared_bytes); }

inline void check_guards() {
  poison_guards(false);
  for (size_t i = 0; i < Memory::GUARD; i++) {
    const bool below = (unsigned char)memory.block[i] != Memory::GUARD_BYTE;
    if (below || (unsigned char)memory.shared[memory.shared_bytes + i] != Memory::GUARD_BYTE) {
      const long offset = below ? long(i) - long(Memory::GUARD) : long(memory.shared_bytes + i);
      fail_block("out of bounds: a plain write at offset %ld of %zu bytes of shared memory", offset,
                 memory.shared_bytes);
      break;
    }
  }
  poison_guards(true);
}

// Checks `bytes` aligned bytes at an offset in shared memory and returns it.
inline u32 shared_offset(u32 p, u32 bytes, const char *operation, Place place) {
  if (p + u64(bytes) > memory.shared_bytes)
    fail(place, self(), "out of bounds: %s of %u bytes at offset %d of %zu bytes of shared memory", operation, bytes,
         int(p), memory.shared_bytes);
  if (p % bytes)
    fail(place, self(), "misaligned: %s of %u bytes at offset %u of shared memory", operation, bytes, p);
  return p;
}

// ---- global memory

inline int find_buffer(const char *p, u32 bytes, bool write) {
  auto holds = [&](int i) {
    const Buffer &buffer = memory.buffers[i];
    const u64 offset = u64(p - buffer.address);
    return offset < buffer.bytes && offset + bytes <= buffer.bytes && (buffer.writable || !write);
  };
  if (memory.latest < memory.number && holds(memory.latest))
    return memory.latest;
  for (int i = 0; i < memory.number; i++)
    if (holds(i))
      return memory.latest = i;
  return -1;
}

[[noreturn]] inline void fail_global(const char *p, u32 bytes, bool write, const char *operation, Place place) {
  if (write && find_buffer(p, bytes, false) >= 0)
    fail(place, self(), "%s of %u bytes to buffer '%s', which is read-only", operation, bytes,
         memory.buffers[find_buffer(p, bytes, false)].name);
  const Buffer *nearest = nullptr; // the one whose begin or end is closest
  u64 least = ~0ull;
  for (int i = 0; i < memory.number; i++) {
    const Buffer &buffer = memory.buffers[i];
    const u64 before = u64(llabs(p - buffer.address)), after = u64(llabs(p - (buffer.address + buffer.bytes)));
    if (before < least || after < least) {
      least = before < after ? before : after;
      nearest = &buffer;
    }
  }
  if (!nearest || !p)
    fail(place, self(), "out of bounds: %s of %u bytes at address %p", operation, bytes, (const void *)p);
  fail(place, self(), "out of bounds: %s of %u bytes at offset %lld of buffer '%s' of %llu bytes", operation, bytes,
       (long long)(p - nearest->address), nearest->name, (unsigned long long)nearest->bytes);
}

// The number of the buffer that holds `bytes` aligned bytes at p.
inline int global_buffer(const void *p, u32 bytes, bool write, const char *operation, Place place) {
  const int found = find_buffer((const char *)p, bytes, write);
  if (found < 0)
    fail_global((const char *)p, bytes, write, operation, place);
  if ((uintptr_t)p % bytes)
    fail(place, self(), "misaligned: %s of %u bytes at offset %lld of buffer '%s'", operation, bytes,
         (long long)((const char *)p - memory.buffers[found].address), memory.buffers[found].name);
  return found;
}

inline void note_buffer(int which, const void *p, u32 bytes, bool write, Place place) {
  const Buffer &buffer = memory.buffers[which];
  if (races.checked && buffer.writable)
    note_global(races.buffers[size_t(which)], u64((const char *)p - buffer.address), bytes, write, buffer.name, place);
}

// ---- plain accesses

template <class V> constexpr u32 size_of_access() {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "an access has 4, 8 or 16 bytes");
  return u32(sizeof(V));
}

inline void note_shared_access(Kind kind, u32 offset, u32 bytes, Place place) {
  if (races.checked)
    note_shared(offset, bytes, kind == STORE, place);
  if (traffic.detailed)
    log_shared(kind, offset, bytes, tag_of(place));
}

template <class V> V read_shared(u32 p, Place place) {
  note_shared_access(LOAD, shared_offset(p, size_of_access<V>(), "load_shared", place), sizeof(V), place);
  V value;
  memcpy(&value, memory.shared + p, sizeof value);
  return value;
}

template <class V> void write_shared(u32 p, V value, Place place) {
  note_shared_access(STORE, shared_offset(p, size_of_access<V>(), "store_shared", place), sizeof(V), place);
  memcpy(memory.shared + p, &value, sizeof value);
}

template <class V> V read_global(const void *p, Place place) {
  const u32 bytes = size_of_access<V>();
  note_buffer(global_buffer(p, bytes, false, "load_global", place), p, bytes, false, place);
  traffic.counts.bytes_read += bytes;
  V value;
  memcpy(&value, p, sizeof value);
  return value;
}

template <class V> void write_global(void *p, V value, Place place) {
  const u32 bytes = size_of_access<V>();
  note_buffer(global_buffer(p, bytes, true, "store_global", place), p, bytes, true, place);
  traffic.counts.bytes_written += bytes;
  memcpy(p, &value, sizeof value);
}

// ---- matrix loads and stores: ldmatrix.x4, stmatrix.x4

struct Rows {
  char *row;
  u32 offset;
  u32 words[4];
};

template <bool TRANSPOSED> void load_rows_of_warp(void **arguments, u32, Place) {
  const Rows *lanes[32];
  u32 offsets[32];
  for (int lane = 0; lane < 32; lane++) {
    lanes[lane] = (const Rows *)arguments[lane];
    offsets[lane] = lanes[lane]->offset;
  }
  if (traffic.detailed)
    for (int matrix = 0; matrix < 4; matrix++)
      count_phase(MATRIX_LOAD, offsets + 8 * matrix, 8, 16);
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < 4; matrix++) {
      const Rows *const *rows = lanes + 8 * matrix;
      const int g = lane / 4, t = lane % 4;
      u16 pair[2];
      if (TRANSPOSED)
        for (int i = 0; i < 2; i++)
          memcpy(&pair[i], rows[2 * t + i]->row + 2 * g, 2);
      else
        memcpy(pair, rows[g]->row + 4 * t, 4);
      memcpy(&((Rows *)arguments[lane])->words[matrix], pair, 4);
    }
}

template <bool TRANSPOSED> void load_rows(u32 (&r)[4], u32 row, Place place) {
  const char *operation = TRANSPOSED ? "load_matrices_transposed" : "load_matrices";
  Rows rows{memory.shared + row, shared_offset(row, 16, operation, place), {}};
  if (races.checked)
    note_shared(rows.offset, 16, false, place);
  whole_warp_collective(load_rows_of_warp<TRANSPOSED>, &rows, operation, place);
  memcpy(r, rows.words, sizeof rows.words);
}

inline void store_rows_of_warp(void **arguments, u32, Place) {
  u32 offsets[32];
  for (int lane = 0; lane < 32; lane++)
    offsets[lane] = ((const Rows *)arguments[lane])->offset;
  if (traffic.detailed)
    for (int matrix = 0; matrix < 4; matrix++)
      count_phase(STORE, offsets + 8 * matrix, 8, 16);
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < 4; matrix++) {
      const Rows *to = (const Rows *)arguments[8 * matrix + lane / 4];
      memcpy(to->row + 4 * (lane % 4), &((const Rows *)arguments[lane])->words[matrix], 4);
    }
}

inline void store_rows(u32 row, const u32 (&r)[4], Place place) {
  Rows rows{memory.shared + row, shared_offset(row, 16, "store_matrices", place), {r[0], r[1], r[2], r[3]}};
  if (races.checked)
    note_shared(rows.offset, 16, true, place);
  whole_warp_collective(store_rows_of_warp, &rows, "store_matrices", place);
}

// ---- asynchronous copies: done as late as the hardware may do them, so that a missing copy_wait shows

OUT_OF_LINE inline void begin_copy(u32 to, const void *from, bool valid, Place place) {
  const u32 offset = shared_offset(to, 16, "copy_async", place);
  if (valid) {
    note_buffer(global_buffer(from, 16, false, "copy_async", place), from, 16, false, place);
    traffic.counts.bytes_read += 16;
  }
  if (races.checked)
    note_shared(offset, 16, true, place, true);
  if (traffic.detailed)
    log_shared(COPY, offset, 16, tag_of(place));
  self().copies.push_back({memory.shared + to, from, valid});
}

inline void close_group() {
  Thread &thread = self();
  thread.groups.push_back(thread.copies.size());
}

OUT_OF_LINE inline void wait_for_copies(size_t unfinished_groups) {
  Thread &thread = self();
  if (thread.groups.size() <= unfinished_groups)
    return;
  const size_t finished = thread.groups.size() - unfinished_groups, copies = thread.groups[finished - 1];
  for (size_t i = 0; i < copies; i++) {
    const Copy &copy = thread.copies[i];
    if (copy.valid)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
    if (races.checked)
      note_copied(u32(copy.to - memory.shared), 16);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(copies));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + long(finished));
  for (size_t &end : thread.groups)
    end -= copies;
}

// ---- counters, the order among blocks

inline void check_counter(const int *counter, bool write, const char *operation, Place place) {
  global_buffer(counter, sizeof *counter, write, operation, place);
}

OUT_OF_LINE inline int take_ticket(int *counter, Place place) {
  check_counter(counter, true, "take", place);
  return (*counter)++;
}

OUT_OF_LINE inline void announce_to(int *counter, Place place) {
  check_counter(counter, true, "announce", place);
  if (races.checked)
    races.announcements.push_back({counter, *counter, now()});
  ++*counter;
}

// Blocks run one after another, so a counter that has not reached the value by now never will.
OUT_OF_LINE inline void wait_for_counter(const int *counter, int value, Place place) {
  check_counter(counter, false, "wait_until", place);
  if (*counter < value)
    fail(place, self(), "wait_until waits for a block that has not run: the counter is %d and must reach %d", *counter,
         value);
  if (races.checked)
    races.acquisitions.push_back({counter, value, now()});
}

} // namespace cuda_on_cpu
