// Criss-cross attention, forward: out = sum of exp(E - lse) v and lse = log sum exp E over the lines of a position.
//
// A block computes the queries of one segment of a line with the keys of one segment of the same line:
//   1. E = scale Q K^T, 16 keys at a time, twice: first for the maximum row_max of each query's energies, then for the
//      weights P = exp(E - row_max), which stay in registers. (The energies themselves would take twice the registers.)
//   2. lse of the line, merged with that of the earlier lines.
//   3. out = P V, a chunk of channels at a time, added to what the earlier lines have written.
// A warp owns ROW_TILES tiles of 16 queries, so that each operand it reads from shared memory is used for all of them.
#include "arithmetic.cuh"
#include "schedule.cuh"

template <class A_, int TILES_, int DEPTH_, int ROW_TILES_, int CHUNK_UNITS_> struct ForwardShape {
  typedef A_ A;
  static constexpr int TILES = TILES_;         // of 16 keys, and of 16 queries, that a block holds
  static constexpr int DEPTH = DEPTH_;         // channels of q and k that a tile holds
  static constexpr int ROW_TILES = ROW_TILES_; // tiles of queries of a warp
  static constexpr int WARPS = (TILES + ROW_TILES - 1) / ROW_TILES, THREADS = 32 * WARPS, ROWS = 16 * TILES;
  static constexpr int SIZE = sizeof(typename A::Element);
  static constexpr int DU = units(DEPTH * SIZE), CU = CHUNK_UNITS_, CHUNK = CU * 16 / SIZE;
  // The tiles of q and k are large enough for two tiles of results, which take their memory later.
  static constexpr int QUERY_BYTES = ROWS * 16 * (DU > CU ? DU : CU), VALUE_BYTES = ROWS * 16 * CU;
  static constexpr int SHARED = 2 * QUERY_BYTES + 2 * VALUE_BYTES + ITEM_BYTES;
};

template <class F> INLINE void forward(const Arguments &a) {
  typedef typename F::A A;
  typedef typename A::Sum Sum;
  constexpr int M = F::ROW_TILES, TILES = F::TILES, DU = F::DU, CU = F::CU, STEPS = DU / A::STEP, N = F::CHUNK / 8;
  constexpr bool HOLD = A::HOLD && M * STEPS <= 16;
  constexpr int UNROLL = HOLD ? STEPS : A::UNROLL;
  char *const queries = shared_memory(), *const keys = queries + F::QUERY_BYTES, *const values = keys + F::QUERY_BYTES;
  const Item &item = next_item(a, values + 2 * F::VALUE_BYTES);
  if (!item.exists)
    return;

  int thread = threadIdx.x;
  u32 start = item.start;
  const int warp = thread >> 5;
  const u64 depth_bytes = (u64)a.depth * F::SIZE, value_bytes = (u64)a.channels * F::SIZE;
  const u64 depth_step = item.inner * depth_bytes, value_step = item.inner * value_bytes;
  const int chunks = (a.channels + F::CHUNK - 1) / F::CHUNK;
  // The last warp may have a tile too many: it computes the last tile again and its results are dropped.
  auto tile = [&](int m) { return min(warp * M + m, TILES - 1); };
  auto owned = [&](int m) { return TILES % M == 0 || warp * M + m < TILES; };
  auto load_values = [&](int c) {
    const char *v = (const char *)a.v + start * value_bytes + item.key * value_step + c * (CU * 16);
    load_rows<F::ROWS, CU, F::THREADS>(values + (c & 1) * F::VALUE_BYTES, v, value_step, item.keys,
                                       (int)value_bytes - c * (CU * 16), thread);
  };

  load_rows<F::ROWS, DU, F::THREADS>(queries, (const char *)a.q + start * depth_bytes + item.query * depth_step,
                                     depth_step, item.queries, (int)depth_bytes, thread);
  load_rows<F::ROWS, DU, F::THREADS>(keys, (const char *)a.k + start * depth_bytes + item.key * depth_step, depth_step,
                                     item.keys, (int)depth_bytes, thread);
  copy_commit();
  load_values(0);
  copy_commit();
  copy_wait<1>();
  __syncthreads();
  hide(thread);
  hide(start);

  // 1. Weights.
  typename A::Weights weights[TILES][M];
  Sum row_max[M][2], row_sum[M][2];
  {
    const int lane = thread & 31, g = lane >> 2, t = lane & 3;
    const Sum scale = (Sum)(a.scale * LOG2_E_DOUBLE), share = (Sum)a.share;
    typename A::Rows q[HOLD ? STEPS : 1][M];
    if (HOLD) {
#pragma unroll
      for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int m = 0; m < M; m++)
          A::template load<DU>(q[HOLD ? s : 0][m], queries, tile(m) * 16, s * A::STEP, lane);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        row_max[m][h] = -infinity(Sum()), row_sum[m][h] = 0;
    const Sum zeros[4] = {0, 0, 0, 0};
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int m = 0; m < M; m++)
        weights[n][m].set(0, zeros), weights[n][m].set(1, zeros);
#pragma unroll 1 // if unrolled, the compiler would merge the two passes and keep all energies in registers
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        Sum x[M][2][4];
        clear(x);
#pragma unroll UNROLL
        for (int s = 0; s < STEPS; s++) {
          if (!HOLD) {
#pragma unroll
            for (int m = 0; m < M; m++)
              A::template load<DU>(q[0][m], queries, tile(m) * 16, s * A::STEP, lane);
          }
          A::template multiply_rows<M, DU>(x, q[HOLD ? s : 0], keys, n * 16, s * A::STEP, lane);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
          // The column of row g's own key and the number of keys, both minus the thread's first column.
          const int own = item.query == item.key ? tile(m) * 16 + g - 2 * t : -1000, end = item.keys - 2 * t;
#pragma unroll
          for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int column = n * 16 + half * 8 + (i & 1), h = i >> 1;
              Sum &e = x[m][half][i];
              e *= scale;
              if (column - 8 * h == own)
                e += share;
              if (column >= end)
                e = -infinity(Sum());
              if (pass == 0) {
                row_max[m][h] = max(row_max[m][h], e);
              } else {
                e = power2(e - (row_max[m][h] == -infinity(Sum()) ? 0 : row_max[m][h]));
                row_sum[m][h] += e;
              }
            }
            if (pass == 1)
              weights[n][m].set(half, x[m][half]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) { // reduced over the four threads of a row
#pragma unroll
          for (int mask = 1; mask < 4; mask *= 2) {
            if (pass == 0)
              row_max[m][h] = max(row_max[m][h], __shfl_xor_sync(~0u, row_max[m][h], mask));
            else
              row_sum[m][h] += __shfl_xor_sync(~0u, row_sum[m][h], mask);
          }
        }
    }
  }

  // 2. lse, once the earlier lines are done. The tile of q is no longer needed: its memory takes the results.
  wait_for_earlier_phases(a, item);
  auto load_before = [&](int c) {
    const char *out = (const char *)a.out + start * value_bytes + item.query * value_step + c * (CU * 16);
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        load_rows<16, CU, 32>((c & 1 ? keys : queries) + tile(m) * 16 * CU * 16, out + tile(m) * 16 * value_step,
                              value_step, item.queries - tile(m) * 16, (int)value_bytes - c * (CU * 16), thread & 31);
  };
  if (!item.first) {
    load_before(0);
    copy_commit();
  }
  Sum factor[M][2], before[M][2];
  {
    const int lane = thread & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = tile(m) * 16 + g + 8 * h;
        const bool inside = row < item.queries && owned(m);
        const Sum empty = -infinity(Sum()), ln2 = (Sum)LN_2_DOUBLE, log2e = (Sum)LOG2_E_DOUBLE;
        Sum *lse = (Sum *)a.lse + start + (u64)(item.query + row) * item.inner;
        const Sum own = ((row_max[m][h] == empty ? 0 : row_max[m][h]) + logarithm2(row_sum[m][h])) * ln2;
        Sum merged = own, part = 1;
        before[m][h] = 0;
        if (!item.first) {
          // The two parts must sum to 1, so they are computed from a and b: `merged` has a rounding error that grows
          // with the energies.
          const Sum other = inside ? load_global<Sum>(lse) : 0, larger = max(other, own);
          if (own != empty || other != empty) {
            const Sum a = power2((own - larger) * log2e), b = power2((other - larger) * log2e);
            merged = larger + logarithm2(a + b) * ln2;
            part = a / (a + b);
            before[m][h] = b / (a + b);
          }
        }
        factor[m][h] = row_sum[m][h] == 0 ? 0 : part / row_sum[m][h];
        if (item.last && merged == empty) // no weight anywhere: 0 / 0
          factor[m][h] = __longlong_as_double(0x7ff8000000000000ll);
        __syncwarp(); // the four threads of a row have read lse before one of them writes it
        if (inside && t == 0)
          store_global<Sum>(lse, merged);
      }
  }

  // 3. Values.
#pragma unroll 1
  for (int c = 0; c < chunks; c++) {
    hide(thread);
    hide(start);
    copy_wait<0>();
    __syncthreads();
    if (c + 1 < chunks) {
      load_values(c + 1);
      if (!item.first)
        load_before(c + 1);
      copy_commit();
    }
    int lane = thread & 31;
    const char *v = values + (c & 1) * F::VALUE_BYTES;
    char *results = !item.first && (c & 1) ? keys : queries;
    Sum x[M][N][4];
    clear(x);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_weights<M, N, CU>(x, weights[n], v, n * 16, 0, lane);
    hide(lane);
    hide(start);
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        put_results<A, CU, N>(results, x[m], tile(m) * 16, 0, factor[m], before[m], !item.first, lane);
    __syncwarp();
    char *out = (char *)a.out + start * value_bytes + item.query * value_step + c * (CU * 16);
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        store_rows<16, CU>(results, tile(m) * 16, out + tile(m) * 16 * value_step, value_step,
                           item.queries - tile(m) * 16, (int)value_bytes - c * (CU * 16), lane);
    __syncwarp();
  }
  finish_item(a, item);
}
