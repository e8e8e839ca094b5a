// Elements and sums: infinities, shuffles, pairs and units of elements, and where a thread finds them in a tile.
#pragma once
#include "tiles.cuh"

constexpr double LOG2_E_DOUBLE = 1.4426950408889634, LN_2_DOUBLE = 0.6931471805599453;

INLINE float infinity(float) { return __uint_as_float(0x7f800000u); }
INLINE double infinity(double) { return __longlong_as_double(0x7ff0000000000000ll); }
INLINE float lowest(float) { return __uint_as_float(0xff7fffffu); } // finite number
INLINE double lowest(double) { return __longlong_as_double(0xffefffffffffffffll); }
INLINE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
INLINE double shuffle(double x, int lane) { return __shfl_sync(~0u, x, lane); }

// The place of the element in row `row` and column `column` of a tile at address 0, for elements of SIZE bytes.
template <int U, int SIZE> INLINE u32 element_place(int row, int column) {
  return offset<U>(row, column * SIZE / 16) + column * SIZE % 16;
}

template <class T> struct Pairs { // of 16-bit elements
  typedef u32 Word;
  static INLINE void get(float &a, float &b, u32 x) {
    const float2 y = unpack(T(), x);
    a = y.x;
    b = y.y;
  }
  static INLINE u32 put(float a, float b) { return pack(T(), a, b); }
};
template <> struct Pairs<float> {
  typedef float2 Word;
  static INLINE void get(float &a, float &b, float2 x) {
    a = x.x;
    b = x.y;
  }
  static INLINE float2 put(float a, float b) { return make_float2(a, b); }
};
template <> struct Pairs<double> {
  typedef double2 Word;
  static INLINE void get(double &a, double &b, double2 x) {
    a = x.x;
    b = x.y;
  }
  static INLINE double2 put(double a, double b) { return make_double2(a, b); }
};

// The elements of one unit.
template <class T, class S> struct Unit {
  static constexpr int SIZE = 16 / sizeof(T);
  S x[SIZE];
  INLINE explicit Unit(uint4 bits) {
    const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(T) == 2) {
        const float2 y = unpack(T(), words[i]);
        x[2 * i] = y.x;
        x[2 * i + 1] = y.y;
      } else if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(words[i]);
      } else if (i < 2) {
        x[i] = __longlong_as_double((long long)((u64)words[2 * i + 1] << 32 | words[2 * i]));
      }
    }
  }
};

template <class S, int M, int N> INLINE void clear(S (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[m][n][i] = 0;
}

// N tiles of 8 columns in the type T, from row `row` and unit `unit` on; `place` is row g, column 2t of the tile.
template <class T, int U, int N, class S> INLINE void store_pairs(u32 place, const S (&x)[N][4], int row, int unit) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      store_shared(moved<U>(place, row + 8 * h, unit + n * (int)sizeof(T) / 2), Pairs<T>::put(x[n][2 * h], x[n][2 * h + 1]));
}
// Calls f(n, i, x) for each of their elements, which belongs to x[n][i].
template <class T, class S, int U, int N, class F> INLINE void each_pair(u32 place, int row, int unit, F f) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      S low, high;
      Pairs<T>::get(low, high, load_shared<typename Pairs<T>::Word>(moved<U>(place, row + 8 * h, unit + n * (int)sizeof(T) / 2)));
      f(n, 2 * h, low);
      f(n, 2 * h + 1, high);
    }
}
// Two transposed tiles in the type S: `place` is row 2t, column g.
template <int U, class S> INLINE void load_transposed_sums(S (&x)[2][4], u32 place, int row, int unit) {
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[n][i] = load_shared<S>(moved<U>(place, row + 8 * n + (i & 1), unit + (i >> 1) * (int)sizeof(S) / 2));
}

// The sums over the chunks of each of 16 rows of one tile times the same row of another.
template <class T, class S, int U> struct UnitRowProducts {
  static constexpr int AT_ONCE = 32 / U;
  S sum[16 / AT_ONCE]; // of every AT_ONCE-th row, one unit in U
  INLINE UnitRowProducts() {
#pragma unroll
    for (int j = 0; j < 16 / AT_ONCE; j++)
      sum[j] = 0;
  }
  INLINE void add(u32 one, u32 other, int lane) {
    const u32 place = offset<U>(lane / U, lane % U);
#pragma unroll
    for (int j = 0; j < 16 / AT_ONCE; j++) {
      const u32 at = moved<U>(place, j * AT_ONCE, 0);
      const Unit<T, S> x(load_shared<uint4>(one + at)), y(load_shared<uint4>(other + at));
#pragma unroll
      for (int e = 0; e < Unit<T, S>::SIZE; e++)
        sum[j] += x.x[e] * y.x[e];
    }
  }
  // Calls f(row, sum) in one lane for each of the 16 rows.
  template <class F> INLINE void each(int lane, F f) const {
#pragma unroll
    for (int j = 0; j < 16 / AT_ONCE; j++) {
      S total = sum[j];
#pragma unroll
      for (int mask = 1; mask < U; mask *= 2)
        total += __shfl_xor_sync(~0u, total, mask);
      if (lane % U == 0)
        f(j * AT_ONCE + lane / U, total);
    }
  }
};
