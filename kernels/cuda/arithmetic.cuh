// Products of small matrices: a struct for each arithmetic (matrix units, TF32, multiply-adds), all with one interface.
//
// A warp computes tiles of 16 rows and 8 columns. With g = lane / 4 and t = lane % 4, each thread holds of a tile
//     x[0], x[1]: row g,     columns 2t, 2t + 1
//     x[2], x[3]: row g + 8, columns 2t, 2t + 1
// in every arithmetic, so each kernel is written once for all of them.
//
//   Element           the type of q, k, v and results in memory
//   Sum               the type of energies, of weights before rounding, and of sums
//   SHEET             bytes of a weight in shared memory
//   STEP              units of a row that an operand Rows holds
//   UNROLL            steps by which the compiler unrolls the loop over a row
//   HOLD              whether the queries' Rows may stay in registers; otherwise each tile of keys reads them again
//   Rows              operand: 16 rows of a tile, STEP units of each
//   Weights           operand: 16 rows and 16 columns, in the registers in which the products computed them
//   multiply_rows     x += rows . (16 rows of a tile)^T: energies
//   multiply_weights  x += weights . (16 rows of a tile): sums of values
#pragma once
#include "tiles.cuh"

constexpr double LOG2_E_DOUBLE = 1.4426950408889634, LN_2_DOUBLE = 0.6931471805599453;

INLINE float infinity(float) { return __uint_as_float(0x7f800000u); }
INLINE double infinity(double) { return __longlong_as_double(0x7ff0000000000000ll); }
INLINE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }
INLINE double shuffle(double x, int lane) { return __shfl_sync(~0u, x, lane); }

// The pair of elements in row `row`, columns 8 n + 2t and 8 n + 2t + 1 of a tile, for elements of SIZE bytes.
template <int U, int SIZE> INLINE int pair_offset(int row, int n, int t) {
  const int bytes = (8 * n + 2 * t) * SIZE;
  return offset<U>(row, bytes / 16) + bytes % 16;
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

// float16 and bfloat16 on the matrix units, sums in float32.
template <class T> struct Matrix16 {
  typedef T Element;
  typedef float Sum;
  static constexpr int SHEET = 2, STEP = 2, UNROLL = 16;
  static constexpr bool HOLD = true;
  struct Rows {
    u32 r[4];
  };
  struct Weights {
    u32 w[4];
    INLINE void set(int half, const float (&x)[4]) {
      w[2 * half] = pack(T(), x[0], x[1]);
      w[2 * half + 1] = pack(T(), x[2], x[3]);
    }
    INLINE void get(int half, float (&x)[4]) const {
      Pairs<T>::get(x[0], x[1], w[2 * half]);
      Pairs<T>::get(x[2], x[3], w[2 * half + 1]);
    }
  };
  template <int U> static INLINE void load(Rows &a, const char *tile, int row, int unit, int lane) {
    load_matrices(a.r, tile + offset<U>(row + (lane & 15), unit + (lane >> 4)));
  }
  template <int M, int U>
  static INLINE void multiply_rows(float (&x)[M][2][4], const Rows (&a)[M], const char *tile, int row, int unit, int lane) {
    u32 b[4];
    load_matrices(b, tile + offset<U>(row + (lane & 7) + (lane >> 4) * 8, unit + (lane >> 3 & 1)));
#pragma unroll
    for (int m = 0; m < M; m++) {
      matrix_multiply(T(), x[m][0], a[m].r, b[0], b[1]);
      matrix_multiply(T(), x[m][1], a[m].r, b[2], b[3]);
    }
  }
  template <int M, int N, int U>
  static INLINE void multiply_weights(float (&x)[M][N][4], const Weights (&w)[M], const char *tile, int row, int column, int lane) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 b[4];
      load_matrices_transposed(b, tile + offset<U>(row + (lane & 15), column / 8 + n + (lane >> 4)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        matrix_multiply(T(), x[m][n], w[m].w, b[0], b[1]);
        matrix_multiply(T(), x[m][n + 1], w[m].w, b[2], b[3]);
      }
    }
  }
  // Reads transposed weights: row r of w is column `column` + r of rows `row` ... `row` + 15 of the sheet.
  template <int U> static INLINE void load_columns(Weights &w, const char *sheet, int row, int column, int lane) {
    load_matrices_transposed(w.w, sheet + offset<U>(row + (lane & 7) + (lane >> 4) * 8, column / 8 + (lane >> 3 & 1)));
  }
  template <int U> static INLINE void store_weights(char *sheet, const Weights &w, int row, int n, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; i++)
      store_shared<u32>(sheet + pair_offset<U, 2>(row + g + 8 * (i & 1), n + (i >> 1), t), w.w[i]);
  }
};

// The Weights of the arithmetics in 32 and 64 bits: numbers as the products computed them, without rounding.
template <class S> struct WideWeights {
  S x[2][4];
  INLINE void set(int half, const S (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[half][i] = y[i];
  }
  INLINE void get(int half, S (&y)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
      y[i] = x[half][i];
  }
  template <int U> INLINE void load_columns(const char *sheet, int row, int column, int lane) {
    const int g = lane >> 2, t = lane & 3, size = sizeof(S);
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int bytes = (column + g + 8 * (i >> 1)) * size;
        x[n][i] = load_shared<S>(sheet + offset<U>(row + 8 * n + 2 * t + (i & 1), bytes / 16) + bytes % 16);
      }
  }
  template <int U> INLINE void store(char *sheet, int row, int n, int lane) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; i++)
      store_shared(sheet + pair_offset<U, sizeof(S)>(row + g + 8 * (i & 1), n + (i >> 1), t),
                   Pairs<S>::put(x[i >> 1][2 * (i & 1)], x[i >> 1][2 * (i & 1) + 1]));
  }
};

// float32 on the matrix units: operands rounded to 10 bits of mantissa, sums in float32.
struct Tf32 {
  typedef float Element;
  typedef float Sum;
  static constexpr int SHEET = 4, STEP = 2, UNROLL = 16;
  static constexpr bool HOLD = true;
  struct Rows {
    u32 r[4];
  };
  typedef WideWeights<float> Weights;
  template <int U> static INLINE void load(Rows &a, const char *tile, int row, int unit, int lane) {
    load_matrices(a.r, tile + offset<U>(row + (lane & 15), unit + (lane >> 4)));
#pragma unroll
    for (int i = 0; i < 4; i++)
      a.r[i] = to_tf32(__uint_as_float(a.r[i]));
  }
  template <int M, int U>
  static INLINE void multiply_rows(float (&x)[M][2][4], const Rows (&a)[M], const char *tile, int row, int unit, int lane) {
    u32 b[4];
    load_matrices(b, tile + offset<U>(row + (lane & 7) + (lane >> 4) * 8, unit + (lane >> 3 & 1)));
#pragma unroll
    for (int i = 0; i < 4; i++)
      b[i] = to_tf32(__uint_as_float(b[i]));
#pragma unroll
    for (int m = 0; m < M; m++) {
      matrix_multiply(float(), x[m][0], a[m].r, b[0], b[1]);
      matrix_multiply(float(), x[m][1], a[m].r, b[2], b[3]);
    }
  }
  // The matrix unit takes columns t and t + 4 of an operand from thread t, but a thread holds columns 2t and 2t + 1.
  // The order of a sum's terms does not matter, so the tile's rows are read in the same order: 2t, then 2t + 1.
  template <int M, int N, int U>
  static INLINE void multiply_weights(float (&x)[M][N][4], const Weights (&w)[M], const char *tile, int row, int column, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
        a[m][0] = to_tf32(w[m].x[half][0]);
        a[m][1] = to_tf32(w[m].x[half][2]);
        a[m][2] = to_tf32(w[m].x[half][1]);
        a[m][3] = to_tf32(w[m].x[half][3]);
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        u32 b[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int bytes = (column + 8 * n + g) * 4;
          b[i] = to_tf32(load_shared<float>(tile + offset<U>(row + 8 * half + 2 * t + i, bytes / 16) + bytes % 16));
        }
#pragma unroll
        for (int m = 0; m < M; m++)
          matrix_multiply(float(), x[m][n], a[m], b[0], b[1]);
      }
    }
  }
  template <int U> static INLINE void load_columns(Weights &w, const char *sheet, int row, int column, int lane) {
    w.load_columns<U>(sheet, row, column, lane);
  }
  template <int U> static INLINE void store_weights(char *sheet, const Weights &w, int row, int n, int lane) {
    w.store<U>(sheet, row, n, lane);
  }
};

// Multiply-adds in S on elements of T, for every GPU: factors are not rounded.
template <class T, class S> struct MultiplyAdd {
  typedef T Element;
  typedef S Sum;
  static constexpr int SHEET = sizeof(S), STEP = 1, UNROLL = 1;
  static constexpr bool HOLD = false;
  struct Rows {
    Unit<T, S> low, high; // rows g and g + 8
    INLINE Rows() : low(make_uint4(0, 0, 0, 0)), high(make_uint4(0, 0, 0, 0)) {}
  };
  typedef WideWeights<S> Weights;
  template <int U> static INLINE void load(Rows &a, const char *tile, int row, int unit, int lane) {
    const int g = lane >> 2;
    a.low = Unit<T, S>(load_shared<uint4>(tile + offset<U>(row + g, unit)));
    a.high = Unit<T, S>(load_shared<uint4>(tile + offset<U>(row + g + 8, unit)));
  }
  template <int M, int U>
  static INLINE void multiply_rows(S (&x)[M][2][4], const Rows (&a)[M], const char *tile, int row, int unit, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const Unit<T, S> b(load_shared<uint4>(tile + offset<U>(row + 8 * n + 2 * t + j, unit)));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int e = 0; e < Unit<T, S>::SIZE; e++) {
            x[m][n][j] += a[m].low.x[e] * b.x[e];
            x[m][n][2 + j] += a[m].high.x[e] * b.x[e];
          }
      }
  }
  template <int M, int N, int U>
  static INLINE void multiply_weights(S (&x)[M][N][4], const Weights (&w)[M], const char *tile, int row, int column, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int k = 0; k < 16; k++) {
      const int from = (lane & ~3) | (k % 8 / 2);
      S low[M], high[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        low[m] = shuffle(w[m].x[k / 8][k % 2], from);
        high[m] = shuffle(w[m].x[k / 8][2 + k % 2], from);
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        S b0, b1;
        Pairs<T>::get(b0, b1, load_shared<typename Pairs<T>::Word>(tile + pair_offset<U, sizeof(T)>(row + k, column / 8 + n, t)));
#pragma unroll
        for (int m = 0; m < M; m++) {
          x[m][n][0] += low[m] * b0;
          x[m][n][1] += low[m] * b1;
          x[m][n][2] += high[m] * b0;
          x[m][n][3] += high[m] * b1;
        }
      }
    }
  }
  template <int U> static INLINE void load_columns(Weights &w, const char *sheet, int row, int column, int lane) {
    w.template load_columns<U>(sheet, row, column, lane);
  }
  template <int U> static INLINE void store_weights(char *sheet, const Weights &w, int row, int n, int lane) {
    w.template store<U>(sheet, row, n, lane);
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

// Writes a tile of results: factor * x or, with `adds`, factor * x + before * (the tile's old value); rounded once.
// `factor` and `before` hold a number for row g and one for row g + 8.
template <class A, int U, int N>
INLINE void put_results(char *tile, const typename A::Sum (&x)[N][4], int row, int n0, const typename A::Sum (&factor)[2],
                        const typename A::Sum (&before)[2], bool adds, int lane) {
  typedef Pairs<typename A::Element> P;
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      char *p = tile + pair_offset<U, sizeof(typename A::Element)>(row + g + 8 * h, n0 + n, t);
      typename A::Sum y0 = factor[h] * x[n][2 * h], y1 = factor[h] * x[n][2 * h + 1];
      if (adds) {
        typename A::Sum z0, z1;
        P::get(z0, z1, load_shared<typename P::Word>(p));
        y0 += before[h] * z0;
        y1 += before[h] * z1;
      }
      store_shared(p, P::put(y0, y1));
    }
}
