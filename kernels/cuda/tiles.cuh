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

// The offset in bytes of unit `unit` of row `row` in a tile.
template <int U> INLINE int offset(int row, int unit) {
  static_assert(U == 2 || U == 4 || U % 8 == 0, "rows of 32, 64 or a multiple of 128 bytes");
  if (U == 2)
    return row * 32 + ((unit ^ (row >> 2 & 1)) << 4);
  if (U == 4)
    return row * 64 + ((unit ^ (row >> 1 & 3)) << 4);
  const int high = row >> 2 & 1, permuted = ((row & 3) ^ high) << 1 | high;
  return row * (U * 16) + ((unit ^ permuted) << 4);
}

// Starts copying ROWS rows of a line, which lie `step` bytes apart from `from` on, to a tile. Rows from `rows` on, and
// each row beyond `bytes`, become zeros. Called by THREADS threads.
template <int ROWS, int U, int THREADS>
INLINE void load_rows(char *tile, const char *from, u64 step, int rows, int bytes, int thread) {
  if constexpr (THREADS % U == 0) {
    constexpr int AT_ONCE = THREADS / U, TURNS = (ROWS + AT_ONCE - 1) / AT_ONCE;
    const int row = thread / U, unit = thread % U;
    const bool inside = unit * 16 < bytes;
    const char *p = from + row * step + unit * 16;
#pragma unroll
    for (int j = 0; j < TURNS; j++) {
      const int r = row + j * AT_ONCE;
      if (ROWS % AT_ONCE == 0 || j + 1 < TURNS || r < ROWS)
        copy_async(tile + offset<U>(r, unit), p, inside && r < rows);
      p += AT_ONCE * step;
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < ROWS * U; i += THREADS) {
      const int row = i / U, unit = i % U;
      copy_async(tile + offset<U>(row, unit), from + row * step + unit * 16, row < rows && unit * 16 < bytes);
    }
  }
}

// Writes ROWS rows of a tile, from its row `row` on, to a line in global memory: only rows before `rows`, and `bytes`
// of each. Called by one warp.
template <int ROWS, int U> INLINE void store_rows(const char *tile, int row, char *to, u64 step, int rows, int bytes, int lane) {
  if constexpr (32 % U == 0) {
    constexpr int AT_ONCE = 32 / U;
    const int r0 = lane / U, unit = lane % U;
    char *p = to + r0 * step + unit * 16;
#pragma unroll
    for (int j = 0; j < ROWS / AT_ONCE; j++) {
      const int r = r0 + j * AT_ONCE;
      const uint4 x = load_shared<uint4>(tile + offset<U>(row + r, unit));
      if (r < rows && unit * 16 < bytes)
        store_global(p, x);
      p += AT_ONCE * step;
    }
  } else {
#pragma unroll 4
    for (int i = lane; i < ROWS * U; i += 32) {
      const int r = i / U, unit = i % U;
      const uint4 x = load_shared<uint4>(tile + offset<U>(row + r, unit));
      if (r < rows && unit * 16 < bytes)
        store_global(to + r * step + unit * 16, x);
    }
  }
}
