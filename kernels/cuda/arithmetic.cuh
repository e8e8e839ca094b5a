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
//   ROUNDS            whether weights are rounded to 11 bits or fewer
//   Rows              operand: 16 rows of a tile, STEP units of each
//   Weights           operand: 16 rows and 16 columns, in the registers in which the products computed them
//   Probabilities     the same for weights of at most 1, which need not be wide to be precise
//   RowProducts       sums of products of the elements of two rows, for 16 rows
//
//   load              Rows from a tile, by its row_place
//   multiply_rows     x += rows . (16 rows of a tile, by its column_place)^T: energies
//   multiply_weights  x += weights . (16 rows of a tile, by its value_place): sums of values
//   store_results     rounded results to a tile, by its result_place; each_result reads them
//   store_weights     weights to a sheet, by its weight_place
//   load_transposed   weights from a sheet, transposed, by its transposed_place
//
// A place is an address that depends on the lane, computed once: for row 0 and unit 0. The row and unit from which an
// operation reads or writes are given beside it as constants, so that the loops compute no addresses (`moved`).
#pragma once
#include "matrix_units.cuh"
#include "multiply_adds.cuh"

// x = before * (a tile's old results), with a factor each for row g and row g + 8.
template <class A, int U, int N>
INLINE void read_results(typename A::Sum (&x)[N][4], u32 place, int row, int unit, const typename A::Sum (&before)[2]) {
  A::template each_result<U, N>(place, row, unit, [&](int n, int i, typename A::Sum old) { x[n][i] = before[i >> 1] * old; });
}
// The same where the old results count as they are.
template <class A, int U, int N> INLINE void read_results(typename A::Sum (&x)[N][4], u32 place, int row, int unit) {
  A::template each_result<U, N>(place, row, unit, [&](int n, int i, typename A::Sum old) { x[n][i] = old; });
}
