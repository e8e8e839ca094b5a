// The arithmetics on the matrix units: 16-bit elements, and float32 rounded to TF32. arithmetic.cuh has the interface.
#pragma once
#include "elements.cuh"

// Addresses of the rows that a lane gives to matrix loads and stores.
// Four matrices of rows 0..15: units 0 and 1 of rows 0..7 and 8..15, in the order of a left operand's registers.
template <int U> INLINE u32 rows_of_matrices(int lane) { return offset<U>(lane & 15, lane >> 4); }
// The same in the order of a right operand's registers.
template <int U> INLINE u32 columns_of_matrices(int lane) { return offset<U>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1); }

// float16 and bfloat16, sums in float32.
template <class T> struct Matrix16 {
  typedef T Element;
  typedef float Sum;
  static constexpr int SHEET = 2, STEP = 2, UNROLL = 16;
  static constexpr bool HOLD = true, ROUNDS = true;
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
  typedef Weights Probabilities;

  template <int U> static INLINE u32 row_place(int lane) { return rows_of_matrices<U>(lane); }
  template <int U> static INLINE u32 column_place(int lane) { return columns_of_matrices<U>(lane); }
  template <int U> static INLINE u32 value_place(int lane) { return rows_of_matrices<U>(lane); }
  template <int U> static INLINE u32 transposed_place(int lane) { return columns_of_matrices<U>(lane); }
  template <int U> static INLINE u32 result_place(int lane) {
    return STORES_MATRICES ? rows_of_matrices<U>(lane) : element_place<U, 2>(lane >> 2, 2 * (lane & 3));
  }
  template <int U> static INLINE u32 weight_place(int lane) { return result_place<U>(lane); }

  template <int U> static INLINE void load(Rows &a, u32 place, int row, int unit) { load_matrices(a.r, moved<U>(place, row, unit)); }
  template <int M, int U>
  static INLINE void multiply_rows(float (&x)[M][2][4], const Rows (&a)[M], u32 place, int row, int unit) {
    u32 b[4];
    load_matrices(b, moved<U>(place, row, unit));
#pragma unroll
    for (int m = 0; m < M; m++) {
      matrix_multiply(T(), x[m][0], a[m].r, b[0], b[1]);
      matrix_multiply(T(), x[m][1], a[m].r, b[2], b[3]);
    }
  }
  template <int M, int N, int U>
  static INLINE void multiply_weights(float (&x)[M][N][4], const Weights (&w)[M], u32 place, int row, int unit) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 b[4];
      load_matrices_transposed(b, moved<U>(place, row, unit + n));
#pragma unroll
      for (int m = 0; m < M; m++) {
        matrix_multiply(T(), x[m][n], w[m].w, b[0], b[1]);
        matrix_multiply(T(), x[m][n + 1], w[m].w, b[2], b[3]);
      }
    }
  }
  template <int U> static INLINE void load_transposed(Weights &w, u32 place, int row, int unit) {
    load_matrices_transposed(w.w, moved<U>(place, row, unit));
  }
  // Four words, of rows g and g + 8 in a unit and then in the next one.
  template <int U> static INLINE void store_words(u32 place, const u32 (&w)[4], int row, int unit) {
    if constexpr (STORES_MATRICES)
      store_matrices(moved<U>(place, row, unit), w);
    else
#pragma unroll
      for (int i = 0; i < 4; i++)
        store_shared<u32>(moved<U>(place, row + 8 * (i & 1), unit + (i >> 1)), w[i]);
  }
  template <int U> static INLINE void store_weights(u32 place, const Weights &w, int row, int unit) {
    store_words<U>(place, w.w, row, unit);
  }
  template <int U, int N> static INLINE void store_results(u32 place, const float (&x)[N][4], int row, int unit) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        words[i] = pack(T(), x[n + (i >> 1)][2 * (i & 1)], x[n + (i >> 1)][2 * (i & 1) + 1]);
      store_words<U>(place, words, row, unit + n);
    }
  }
  // Calls f(n, i, x) for each element x of results in a tile that the thread holds as x[n][i].
  template <int U, int N, class F> static INLINE void each_result(u32 place, int row, int unit, F f) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      u32 words[4];
      if constexpr (STORES_MATRICES)
        load_matrices(words, moved<U>(place, row, unit + n));
      else
#pragma unroll
        for (int i = 0; i < 4; i++)
          words[i] = load_shared<u32>(moved<U>(place, row + 8 * (i & 1), unit + n + (i >> 1)));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float low, high;
        Pairs<T>::get(low, high, words[i]);
        f(n + (i >> 1), 2 * (i & 1), low);
        f(n + (i >> 1), 2 * (i & 1) + 1, high);
      }
    }
  }

  // The sums over a chunk of a row of one tile times the same row of another: the diagonal of a product of matrices.
  template <int U> struct RowProducts {
    float sum[2] = {0, 0}; // of rows g and g + 8, in the lanes with t = g / 2
    INLINE void add(u32 one, u32 other, int lane) {
      float x[1][2][4];
      clear(x);
#pragma unroll
      for (int s = 0; s < U / STEP; s++) {
        Rows a[1];
        load<U>(a[0], one + row_place<U>(lane), 0, s * STEP);
        multiply_rows<1, U>(x, a, other + column_place<U>(lane), 0, s * STEP);
      }
      const bool odd = lane >> 2 & 1;
      sum[0] += odd ? x[0][0][1] : x[0][0][0];
      sum[1] += odd ? x[0][1][3] : x[0][1][2];
    }
    // Calls f(row, sum) in one lane for each of the 16 rows.
    template <class F> INLINE void each(int lane, F f) const {
      if ((lane & 3) == lane >> 3) {
        f(lane >> 2, sum[0]);
        f((lane >> 2) + 8, sum[1]);
      }
    }
  };
};

#if __CUDA_ARCH__ >= 800
// Weights in 32 bits that are rounded to TF32 when they are set.
struct Tf32Weights {
  float x[2][4];
  INLINE void set(int half, const float (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[half][i] = __uint_as_float(to_tf32(y[i]));
  }
  INLINE void get(int half, float (&y)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
      y[i] = x[half][i];
  }
};

// Weights of at most 1 with the 11 significant bits of TF32, in 16: half the registers. A float16 that holds 2^15 times
// the weight is normal down to weights of 2^-29.
struct Tf32Probabilities {
  u32 w[4];
  INLINE void set(int half, const float (&x)[4]) {
    w[2 * half] = pack(f16(), 32768 * x[0], 32768 * x[1]);
    w[2 * half + 1] = pack(f16(), 32768 * x[2], 32768 * x[3]);
  }
  INLINE void get(int half, float (&x)[4]) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 word = w[2 * half + h];
      hide(word); // or the compiler would unpack all weights once, before a loop, and keep them
      const float2 y = unpack(f16(), word);
      x[2 * h] = y.x * (1.0f / 32768);
      x[2 * h + 1] = y.y * (1.0f / 32768);
    }
  }
};

// float32 with operands rounded to 10 bits of mantissa, sums in float32.
struct Tf32 {
  typedef float Element;
  typedef float Sum;
  static constexpr int SHEET = 4, STEP = 2, UNROLL = 16;
  static constexpr bool HOLD = true, ROUNDS = true;
  struct Rows {
    u32 r[4];
  };
  typedef Tf32Weights Weights;
  typedef Tf32Probabilities Probabilities;

  // The matrix unit takes columns t and t + 4 of an operand from thread t, but a thread holds columns 2t and 2t + 1 of
  // weights. The order of a sum's terms does not matter, so the values' rows are read in the same order: 2t, then 2t + 1.
  template <int U> static INLINE u32 row_place(int lane) { return rows_of_matrices<U>(lane); }
  template <int U> static INLINE u32 column_place(int lane) { return columns_of_matrices<U>(lane); }
  template <int U> static INLINE u32 value_place(int lane) { return element_place<U, 4>(2 * (lane & 3), lane >> 2); }
  template <int U> static INLINE u32 transposed_place(int lane) { return element_place<U, 4>(2 * (lane & 3), lane >> 2); }
  template <int U> static INLINE u32 result_place(int lane) { return element_place<U, 4>(lane >> 2, 2 * (lane & 3)); }
  template <int U> static INLINE u32 weight_place(int lane) { return result_place<U>(lane); }

  template <int U> static INLINE void load(Rows &a, u32 place, int row, int unit) {
    load_matrices(a.r, moved<U>(place, row, unit));
#pragma unroll
    for (int i = 0; i < 4; i++)
      a.r[i] = to_tf32(__uint_as_float(a.r[i]));
  }
  template <int M, int U>
  static INLINE void multiply_rows(float (&x)[M][2][4], const Rows (&a)[M], u32 place, int row, int unit) {
    u32 b[4];
    load_matrices(b, moved<U>(place, row, unit));
#pragma unroll
    for (int i = 0; i < 4; i++)
      b[i] = to_tf32(__uint_as_float(b[i]));
#pragma unroll
    for (int m = 0; m < M; m++) {
      matrix_multiply(float(), x[m][0], a[m].r, b[0], b[1]);
      matrix_multiply(float(), x[m][1], a[m].r, b[2], b[3]);
    }
  }
  template <int M, int N, int U, class W>
  static INLINE void multiply_weights(float (&x)[M][N][4], const W (&w)[M], u32 place, int row, int unit) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) {
        float y[4];
        w[m].get(half, y);
#pragma unroll
        for (int i = 0; i < 4; i++) // rows g and g + 8 of column 2t, then of column 2t + 1
          a[m][i] = __float_as_uint(y[2 * (i & 1) + (i >> 1)]);
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        u32 b[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
          b[i] = to_tf32(load_shared<float>(moved<U>(place, row + 8 * half + i, unit + 2 * n)));
#pragma unroll
        for (int m = 0; m < M; m++)
          matrix_multiply(float(), x[m][n], a[m], b[0], b[1]);
      }
    }
  }
  template <int U> static INLINE void load_transposed(Weights &w, u32 place, int row, int unit) {
    load_transposed_sums<U>(w.x, place, row, unit);
  }
  template <int U> static INLINE void store_weights(u32 place, const Weights &w, int row, int unit) {
    store_pairs<float, U, 2>(place, w.x, row, unit);
  }
  template <int U, int N> static INLINE void store_results(u32 place, const float (&x)[N][4], int row, int unit) {
    store_pairs<float, U, N>(place, x, row, unit);
  }
  template <int U, int N, class F> static INLINE void each_result(u32 place, int row, int unit, F f) {
    each_pair<float, float, U, N>(place, row, unit, f);
  }
  template <int U> using RowProducts = UnitRowProducts<float, float, U>;
};
#endif
