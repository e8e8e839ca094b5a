// The stages of criss-cross attention as separate kernels, each linear in each of its arguments: the third one is the
// transpose of the second, for derivatives. Energies and weights are (images, *sizes, neighbours) in the type of sums.
//
//   affinity              E_uj = q_u . k_i                 i is the j-th neighbour of u
//   aggregate             out_u = sum over j of W_uj v_i
//   aggregate_transposed  out_i = sum over the (u, j) whose neighbour is i of W_uj v_u
#include "arithmetic.cuh"
#include "schedule.cuh"

template <class A_, int TILES_, int ROW_TILES_, int CHUNK_UNITS_> struct StageShape {
  typedef A_ A;
  static constexpr int TILES = TILES_;         // of 16 keys, and of 16 queries, that a block holds
  static constexpr int ROW_TILES = ROW_TILES_; // tiles of rows of a warp
  static constexpr int WARPS = (TILES + ROW_TILES - 1) / ROW_TILES, THREADS = 32 * WARPS, ROWS = 16 * TILES;
  static constexpr int SIZE = sizeof(typename A::Element);
  static constexpr int CU = CHUNK_UNITS_, CHUNK_BYTES = CU * 16, VALUE_BYTES = ROWS * CHUNK_BYTES;
  static constexpr int SHARED = 4 * VALUE_BYTES + ITEM_BYTES;
};

// The index of the energy of a query and a key, given as places on the line; -1 where both are the same position and
// this axis leaves that out.
INLINE long long neighbour(const Arguments &a, const Item &item, int query, int key) {
  const int skips = a.skips[item.axis];
  if (skips && query == key)
    return -1;
  const u64 position = item.start + (u64)query * item.inner;
  return (long long)(position * a.neighbours + a.slot[item.axis] + key - (skips && key > query));
}

// The energies of the M tiles of queries from tile `tile0` on.
template <class S, int M> INLINE void affinity_tiles(const Arguments &a, const Item &item, int tile0) {
  typedef typename S::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = S::TILES, CU = S::CU;
  const u32 queries = shared_address(shared_memory()), keys = queries + 2 * S::VALUE_BYTES;
  const int thread = threadIdx.x, lane = thread & 31, bytes = a.depth * S::SIZE;
  const u32 step = item.inner * (bytes / 16), start = item.start * (bytes / 16);
  const RowCopies<S::ROWS, CU, S::THREADS> copies(queries, thread);
  const u32 q = copies.at(start + item.query * step, step), k = copies.at(start + item.key * step, step);
  const u32 row_place = queries + tile0 * 16 * S::CHUNK_BYTES + A::template row_place<CU>(lane), column_place = keys + A::template column_place<CU>(lane);

  Sum x[TILES][M][2][4];
#pragma unroll
  for (int n = 0; n < TILES; n++)
    clear(x[n]);
  u32 buffer = 0;
  auto load_chunk = [&](int skip, u32 to) {
    copies.template load<KEEP>(to, a.q, q, step, skip, item.queries, bytes);
    copies.template load<KEEP>(2 * S::VALUE_BYTES + to, a.k, k, step, skip, item.keys, bytes);
    copy_commit();
  };
  load_chunk(0, 0);
#pragma unroll 1
  for (int skip = 0; skip < bytes; skip += S::CHUNK_BYTES) {
    copy_wait<0>();
    block_barrier();
    if (skip + S::CHUNK_BYTES < bytes)
      load_chunk(skip + S::CHUNK_BYTES, buffer ^ S::VALUE_BYTES);
#pragma unroll A::UNROLL
    for (int s = 0; s < CU / A::STEP; s++) {
      typename A::Rows r[M];
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template load<CU>(r[m], row_place + buffer, m * 16, s * A::STEP);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_rows<M, CU>(x[n], r, column_place + buffer, n * 16, s * A::STEP);
    }
    buffer ^= S::VALUE_BYTES;
  }
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = (tile0 + m) * 16 + g + 8 * (i >> 1 & 1), column = n * 16 + 8 * (i >> 2) + 2 * t + (i & 1);
        if (row < item.queries && column < item.keys) {
          const long long at = neighbour(a, item, item.query + row, item.key + column);
          if (at >= 0)
            store_global<Sum>((Sum *)a.weights + at, x[n][m][i >> 2][i & 3]);
        }
      }
}

// Each row sums the values of its columns, for the M tiles of rows from tile `tile0` on: rows are queries and columns keys
// or, transposed, the other way round.
template <class S, int M, bool TRANSPOSED> INLINE void sum_tiles(const Arguments &a, const Item &item, int tile0) {
  typedef typename S::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = S::TILES, CU = S::CU, N = S::CHUNK_BYTES / S::SIZE / 8;
  const u32 values = shared_address(shared_memory()), results = values + 2 * S::VALUE_BYTES;
  const int thread = threadIdx.x, lane = thread & 31, bytes = a.channels * S::SIZE;
  const u32 step = item.inner * (bytes / 16), start = item.start * (bytes / 16);
  const int row0 = TRANSPOSED ? item.key : item.query, rows = TRANSPOSED ? item.keys : item.queries;
  const int column0 = TRANSPOSED ? item.query : item.key, columns = TRANSPOSED ? item.queries : item.keys;
  const RowCopies<S::ROWS, CU, S::THREADS> copies(values, thread);
  const RowCopies<16 * M, CU, 32> own(results + tile0 * 16 * S::CHUNK_BYTES, lane);
  const u32 v = copies.at(start + column0 * step, step), out = own.at(start + (row0 + tile0 * 16) * step, step);
  const int own_rows = rows - tile0 * 16;
  const u32 value_place = values + A::template value_place<CU>(lane);
  const u32 result_place = results + tile0 * 16 * S::CHUNK_BYTES + A::template result_place<CU>(lane);

  copies.template load<KEEP>(0, a.v, v, step, 0, columns, bytes);
  copy_commit();
  typename A::Weights weights[TILES][M];
  {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          Sum w[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int row = (tile0 + m) * 16 + g + 8 * (i >> 1), column = n * 16 + 8 * half + 2 * t + (i & 1);
            w[i] = 0;
            if (row < rows && column < columns) {
              const int query = TRANSPOSED ? column0 + column : row0 + row, key = TRANSPOSED ? row0 + row : column0 + column;
              const long long at = neighbour(a, item, query, key);
              if (at >= 0)
                w[i] = load_global<Sum>((const Sum *)a.weights + at);
            }
          }
          weights[n][m].set(half, w);
        }
  }
  wait_for_earlier_phases(a, item);
  u32 buffer = 0;
  if (!item.first)
    own.template load<KEEP>(0, a.out, out, step, 0, own_rows, bytes);
  copy_commit();

#pragma unroll 1
  for (int skip = 0; skip < bytes; skip += S::CHUNK_BYTES) {
    copy_wait<0>();
    block_barrier();
    if (skip + S::CHUNK_BYTES < bytes) {
      copies.template load<KEEP>(buffer ^ S::VALUE_BYTES, a.v, v, step, skip + S::CHUNK_BYTES, columns, bytes);
      if (!item.first)
        own.template load<KEEP>(buffer ^ S::VALUE_BYTES, a.out, out, step, skip + S::CHUNK_BYTES, own_rows, bytes);
    }
    copy_commit();
    Sum x[M][N][4];
    clear(x);
    if (!item.first)
#pragma unroll
      for (int m = 0; m < M; m++)
        read_results<A, CU, N>(x[m], result_place + buffer, m * 16, 0);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_weights<M, N, CU>(x, weights[n], value_place + buffer, n * 16, 0);
#pragma unroll
    for (int m = 0; m < M; m++)
      A::template store_results<CU, N>(result_place + buffer, x[m], m * 16, 0);
    __syncwarp();
    own.template store<KEEP>(buffer, a.out, out, step, skip, own_rows, bytes);
    buffer ^= S::VALUE_BYTES;
  }
}

template <class S, bool TRANSPOSED> INLINE void sum_values(const Arguments &a) {
  const Item &item = next_item(a, S::SHARED - ITEM_BYTES);
  if (!item.exists)
    return;
  with_tiles<S>(item, [&](auto tiles, int tile0) { sum_tiles<S, tiles.number, TRANSPOSED>(a, item, tile0); });
  finish_item(a, item);
}
template <class S> INLINE void aggregate(const Arguments &a) { sum_values<S, false>(a); }
template <class S> INLINE void aggregate_transposed(const Arguments &a) { sum_values<S, true>(a); }

template <class S> INLINE void affinity(const Arguments &a) {
  const Item &item = next_item(a, S::SHARED - ITEM_BYTES);
  if (!item.exists)
    return;
  with_tiles<S>(item, [&](auto tiles, int tile0) { affinity_tiles<S, tiles.number>(a, item, tile0); });
}
