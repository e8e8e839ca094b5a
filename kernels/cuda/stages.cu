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
  static constexpr int CU = CHUNK_UNITS_, CHUNK = CU * 16 / SIZE, CHUNK_BYTES = ROWS * 16 * CU;
  static constexpr int SHARED = 4 * CHUNK_BYTES + ITEM_BYTES;
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

template <class S> INLINE void affinity(const Arguments &a) {
  typedef typename S::A A;
  typedef typename A::Sum Sum;
  constexpr int M = S::ROW_TILES, TILES = S::TILES, CU = S::CU;
  char *const queries = shared_memory(), *const keys = queries + 2 * S::CHUNK_BYTES;
  const Item &item = next_item(a, keys + 2 * S::CHUNK_BYTES);
  if (!item.exists)
    return;

  int thread = threadIdx.x;
  const int warp = thread >> 5;
  const u64 row_bytes = (u64)a.depth * S::SIZE, step = item.inner * row_bytes;
  const int chunks = (a.depth + S::CHUNK - 1) / S::CHUNK;
  auto tile = [&](int m) { return min(warp * M + m, TILES - 1); };
  auto owned = [&](int m) { return TILES % M == 0 || warp * M + m < TILES; };
  auto load_chunk = [&](int c) {
    const int bytes = (int)row_bytes - c * (CU * 16), buffer = (c & 1) * S::CHUNK_BYTES;
    const u64 at = item.start * row_bytes + c * (CU * 16);
    load_rows<S::ROWS, CU, S::THREADS>(queries + buffer, (const char *)a.q + at + item.query * step, step, item.queries,
                                       bytes, thread);
    load_rows<S::ROWS, CU, S::THREADS>(keys + buffer, (const char *)a.k + at + item.key * step, step, item.keys, bytes,
                                       thread);
  };

  Sum x[TILES][M][2][4];
#pragma unroll
  for (int n = 0; n < TILES; n++)
    clear(x[n]);
  load_chunk(0);
  copy_commit();
#pragma unroll 1
  for (int c = 0; c < chunks; c++) {
    hide(thread);
    const int lane = thread & 31;
    copy_wait<0>();
    __syncthreads();
    if (c + 1 < chunks)
      load_chunk(c + 1);
    copy_commit();
    const char *q = queries + (c & 1) * S::CHUNK_BYTES, *k = keys + (c & 1) * S::CHUNK_BYTES;
#pragma unroll A::UNROLL
    for (int s = 0; s < CU / A::STEP; s++) {
      typename A::Rows r[M];
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template load<CU>(r[m], q, tile(m) * 16, s * A::STEP, lane);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_rows<M, CU>(x[n], r, k, n * 16, s * A::STEP, lane);
    }
  }
  const int lane = thread & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < M; m++)
    if (owned(m)) {
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int row = tile(m) * 16 + g + 8 * (i >> 1 & 1), column = n * 16 + 8 * (i >> 2) + 2 * t + (i & 1);
          if (row < item.queries && column < item.keys) {
            const long long at = neighbour(a, item, item.query + row, item.key + column);
            if (at >= 0)
              store_global<Sum>((Sum *)a.weights + at, x[n][m][i >> 2][i & 3]);
          }
        }
    }
}

// Each row sums the values of its columns: rows are queries and columns keys or, transposed, the other way round.
template <class S, bool TRANSPOSED> INLINE void sum_values(const Arguments &a) {
  typedef typename S::A A;
  typedef typename A::Sum Sum;
  constexpr int M = S::ROW_TILES, TILES = S::TILES, CU = S::CU, N = S::CHUNK / 8;
  char *const values = shared_memory(), *const results = values + 2 * S::CHUNK_BYTES;
  const Item &item = next_item(a, results + 2 * S::CHUNK_BYTES);
  if (!item.exists)
    return;

  int thread = threadIdx.x;
  const int warp = thread >> 5;
  const u64 row_bytes = (u64)a.channels * S::SIZE, step = item.inner * row_bytes;
  const int chunks = (a.channels + S::CHUNK - 1) / S::CHUNK;
  const int row0 = TRANSPOSED ? item.key : item.query, rows = TRANSPOSED ? item.keys : item.queries;
  const int column0 = TRANSPOSED ? item.query : item.key, columns = TRANSPOSED ? item.queries : item.keys;
  auto tile = [&](int m) { return min(warp * M + m, TILES - 1); };
  auto owned = [&](int m) { return TILES % M == 0 || warp * M + m < TILES; };
  auto load_values = [&](int c) {
    const char *v = (const char *)a.v + item.start * row_bytes + column0 * step + c * (CU * 16);
    load_rows<S::ROWS, CU, S::THREADS>(values + (c & 1) * S::CHUNK_BYTES, v, step, columns, (int)row_bytes - c * (CU * 16),
                                       thread);
  };
  auto load_before = [&](int c) {
    const char *out = (const char *)a.out + item.start * row_bytes + row0 * step + c * (CU * 16);
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        load_rows<16, CU, 32>(results + (c & 1) * S::CHUNK_BYTES + tile(m) * 16 * CU * 16, out + tile(m) * 16 * step, step,
                              rows - tile(m) * 16, (int)row_bytes - c * (CU * 16), thread & 31);
  };

  load_values(0);
  copy_commit();
  typename A::Weights weights[TILES][M];
  {
    const int lane = thread & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          Sum w[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int row = tile(m) * 16 + g + 8 * (i >> 1), column = n * 16 + 8 * half + 2 * t + (i & 1);
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
  if (!item.first)
    load_before(0);
  copy_commit();

  const Sum one[2] = {1, 1};
#pragma unroll 1
  for (int c = 0; c < chunks; c++) {
    hide(thread);
    const int lane = thread & 31;
    copy_wait<0>();
    __syncthreads();
    if (c + 1 < chunks) {
      load_values(c + 1);
      if (!item.first)
        load_before(c + 1);
    }
    copy_commit();
    const char *v = values + (c & 1) * S::CHUNK_BYTES;
    char *sums = results + (c & 1) * S::CHUNK_BYTES;
    Sum x[M][N][4];
    clear(x);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_weights<M, N, CU>(x, weights[n], v, n * 16, 0, lane);
    char *out = (char *)a.out + item.start * row_bytes + row0 * step + c * (CU * 16);
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        put_results<A, CU, N>(sums, x[m], tile(m) * 16, 0, one, one, !item.first, lane);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        store_rows<16, CU>(sums, tile(m) * 16, out + tile(m) * 16 * step, step, rows - tile(m) * 16,
                           (int)row_bytes - c * (CU * 16), lane);
    __syncwarp();
  }
  finish_item(a, item);
}

template <class S> INLINE void aggregate(const Arguments &a) { sum_values<S, false>(a); }
template <class S> INLINE void aggregate_transposed(const Arguments &a) { sum_values<S, true>(a); }
