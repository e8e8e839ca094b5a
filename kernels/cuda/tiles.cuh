// Tiles: rows of a line in shared memory without bank conflicts, each row of U units of 16 bytes.
//
// The units of a row are permuted depending on the row, so that each access of a warp goes to different banks: to eight
// rows of one column (matrix loads), to pairs of units in rows 0, 2, 4, 6 or 1, 3, 5, 7 (32-bit operands) and to pairs
// of units in rows 0..3 or 4..7 (32-bit results).
#pragma once
#include "primitives.cuh"

// The number of units of a tile's row that holds at least `bytes`.
__device__ constexpr int units(int bytes) {
  return bytes <= 32 ? 2 : bytes <= 64 ? 4 : (bytes + 127) / 128 * 8;
}

// The permutation of row `row`: unit u lies at place u xor this. It is linear: that of r1 xor r2 is the xor of both.
template <int U> __device__ constexpr int swizzle(int row) {
  static_assert(U == 2 || U == 4 || U % 8 == 0, "rows of 32, 64 or a multiple of 128 bytes");
  const int high = row >> 2 & 1;
  return U == 2 ? high : U == 4 ? row >> 1 & 3 : ((row & 3) ^ high) << 1 | high;
}

// The offset in bytes of unit `unit` of row `row` in a tile.
template <int U> INLINE u32 offset(int row, int unit) { return row * (U * 16) + ((unit ^ swizzle<U>(row)) << 4); }

// The address that lies `rows` rows and `units` units from `place`: without a computation where both are constants, but
// for one exclusive or. The row of `place` must be 0 in those of its three lowest bits where `rows` is not, or `rows` a
// multiple of 4; likewise its unit.
template <int U> INLINE u32 moved(u32 place, int rows, int units) {
  constexpr int PERMUTED = U < 8 ? U - 1 : 7;
  return (place ^ ((units & PERMUTED) ^ swizzle<U>(rows)) << 4) + rows * (U * 16) + ((units & ~PERMUTED) << 4);
}

// Starts copying ROWS rows of a line, which lie `step` bytes apart from `from` on, to a tile. Rows from `rows` on, and
// each row beyond `bytes`, become zeros. Called by THREADS threads.
template <int ROWS, int U, int THREADS>
INLINE void load_rows(u32 tile, const char *from, u64 step, int rows, int bytes, int thread, bool last_use) {
  auto copy = [&](u32 to, const char *p, bool valid) {
    if (last_use)
      copy_async<LAST_USE>(to, p, valid);
    else
      copy_async<KEEP>(to, p, valid);
  };
  if constexpr (THREADS % U == 0) {
    constexpr int AT_ONCE = THREADS / U, TURNS = (ROWS + AT_ONCE - 1) / AT_ONCE;
    const int row = thread / U, unit = thread % U;
    const bool inside = unit * 16 < bytes;
    const char *p = from + row * step + unit * 16;
#pragma unroll
    for (int j = 0; j < TURNS; j++) {
      const int r = row + j * AT_ONCE;
      if (ROWS % AT_ONCE == 0 || j + 1 < TURNS || r < ROWS)
        copy(tile + offset<U>(r, unit), p, inside && r < rows);
      p += AT_ONCE * step;
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < ROWS * U; i += THREADS) {
      const int row = i / U, unit = i % U;
      copy(tile + offset<U>(row, unit), from + row * step + unit * 16, row < rows && unit * 16 < bytes);
    }
  }
}

// What a thread copies of every chunk of channels: one unit of every AT_ONCE-th of ROWS rows of a line, in a tile of U
// units a row, shared by THREADS threads. Its places are computed once; a chunk adds constants to them.
template <int ROWS, int U, int THREADS> struct RowCopies {
  static constexpr int AT_ONCE = THREADS / U, TURNS = (ROWS + AT_ONCE - 1) / AT_ONCE;
  static_assert(THREADS % U == 0 && (AT_ONCE % 4 == 0 || 32 % AT_ONCE == 0), "rows are permuted like the first, moved");
  u32 place;     // of the thread's first unit in the tile
  int row, unit;

  INLINE RowCopies(u32 tile, int thread)
      : place(tile + offset<U>(thread / U, thread % U)), row(thread / U), unit(thread % U) {}

  // The thread's first unit in an array in which the line starts at unit `start`, its rows `step` units apart.
  INLINE u32 at(u32 start, u32 step) const { return start + row * step + unit; }

  // Calls f(address in the tile, address in the array, whether both exist) for each of the thread's units of a chunk.
  //   shift    added to the tile's address
  //   at       the thread's first unit in the array (in units, a register is enough for 64 GiB)
  //   step     units from a row to the next
  //   skip     bytes of the line before the chunk; its `rows` rows have `bytes` bytes
  template <class F> INLINE void each(u32 shift, const void *array, u32 at, u32 step, int skip, int rows, int bytes, F f) const {
    const int left = unit * 16 + skip < bytes ? rows - row : 0;
    char *const p = (char *)array + (u64)at * 16 + skip;
    hide(step); // or its multiples would be kept in registers for the next time
#pragma unroll
    for (int j = 0; j < TURNS; j++)
      if (ROWS % AT_ONCE == 0 || j + 1 < TURNS || row + j * AT_ONCE < ROWS)
        f(moved<U>(place, j * AT_ONCE, 0) + shift, p + (u64)step * (16 * AT_ONCE * j), j * AT_ONCE < left);
  }
  // Starts copying a chunk to the tile; places without a position or a channel become zeros.
  template <Use USE> INLINE void load(u32 shift, const void *array, u32 at, u32 step, int skip, int rows, int bytes) const {
    each(shift, array, at, step, skip, rows, bytes, [&](u32 to, char *from, bool valid) { copy_async<USE>(to, from, valid); });
  }
  // Writes a chunk of the tile to the line.
  template <Use USE> INLINE void store(u32 shift, void *array, u32 at, u32 step, int skip, int rows, int bytes) const {
    each(shift, array, at, step, skip, rows, bytes, [&](u32 from, char *to, bool valid) {
      const uint4 x = load_shared<uint4>(from);
      if (valid)
        store_global<USE>(to, x);
    });
  }
  // Adds a chunk of the tile, of elements T, to the line.
  template <class T> INLINE void add(u32 shift, void *array, u32 at, u32 step, int skip, int rows, int bytes) const {
    each(shift, array, at, step, skip, rows, bytes, [&](u32 from, char *to, bool valid) {
      const uint4 x = load_shared<uint4>(from);
      if (valid)
        add_global(T(), to, x);
    });
  }
};
