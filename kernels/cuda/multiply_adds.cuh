// The arithmetic of multiply-adds, for every GPU and every dtype; factors are not rounded. arithmetic.cuh has the interface.
#pragma once
#include "elements.cuh"

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
};

template <class T, class S> struct MultiplyAdd { // of elements T, in S
  typedef T Element;
  typedef S Sum;
  static constexpr int SIZE = sizeof(T), SHEET = sizeof(S), STEP = 1, UNROLL = 1;
  static constexpr bool HOLD = false, ROUNDS = false;
  struct Rows {
    Unit<T, S> low, high; // rows g and g + 8
    INLINE Rows() : low(make_uint4(0, 0, 0, 0)), high(make_uint4(0, 0, 0, 0)) {}
  };
  typedef WideWeights<S> Weights;
  typedef Weights Probabilities;

  template <int U> static INLINE u32 row_place(int lane) { return offset<U>(lane >> 2, 0); }
  template <int U> static INLINE u32 column_place(int lane) { return offset<U>(2 * (lane & 3), 0); }
  template <int U> static INLINE u32 value_place(int lane) { return element_place<U, SIZE>(0, 2 * (lane & 3)); }
  template <int U> static INLINE u32 transposed_place(int lane) { return element_place<U, SHEET>(2 * (lane & 3), lane >> 2); }
  template <int U> static INLINE u32 result_place(int lane) { return element_place<U, SIZE>(lane >> 2, 2 * (lane & 3)); }
  template <int U> static INLINE u32 weight_place(int lane) { return element_place<U, SHEET>(lane >> 2, 2 * (lane & 3)); }

  template <int U> static INLINE void load(Rows &a, u32 place, int row, int unit) {
    a.low = Unit<T, S>(load_shared<uint4>(moved<U>(place, row, unit)));
    a.high = Unit<T, S>(load_shared<uint4>(moved<U>(place, row + 8, unit)));
  }
  template <int M, int U> static INLINE void multiply_rows(S (&x)[M][2][4], const Rows (&a)[M], u32 place, int row, int unit) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const Unit<T, S> b(load_shared<uint4>(moved<U>(place, row + 8 * n + j, unit)));
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
  static INLINE void multiply_weights(S (&x)[M][N][4], const Weights (&w)[M], u32 place, int row, int unit) {
    const int first = threadIdx.x & 28; // of the row's four lanes
#pragma unroll
    for (int k = 0; k < 16; k++) {
      S low[M], high[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        low[m] = shuffle(w[m].x[k / 8][k % 2], first | k % 8 / 2);
        high[m] = shuffle(w[m].x[k / 8][2 + k % 2], first | k % 8 / 2);
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        S b0, b1;
        Pairs<T>::get(b0, b1, load_shared<typename Pairs<T>::Word>(moved<U>(place, row + k, unit + n * SIZE / 2)));
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
  template <int U> static INLINE void load_transposed(Weights &w, u32 place, int row, int unit) {
    load_transposed_sums<U>(w.x, place, row, unit);
  }
  template <int U> static INLINE void store_weights(u32 place, const Weights &w, int row, int unit) {
    store_pairs<S, U, 2>(place, w.x, row, unit);
  }
  template <int U, int N> static INLINE void store_results(u32 place, const S (&x)[N][4], int row, int unit) {
    store_pairs<T, U, N>(place, x, row, unit);
  }
  template <int U, int N, class F> static INLINE void each_result(u32 place, int row, int unit, F f) {
    each_pair<T, S, U, N>(place, row, unit, f);
  }
  template <int U> using RowProducts = UnitRowProducts<T, S, U>;
};
