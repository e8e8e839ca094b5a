// Criss-cross attention, backward: with P = exp(E - lse) and delta_u = dout_u . out_u - dlse_u, over the lines,
//   dv += P^T dout,   dS = P (dout V^T - delta),   dq += scale dS K,   dk += scale dS^T Q.
//
// A block computes the queries of one segment of a line with the keys of one segment of the same line. All products are
// transposed, with keys as rows: so P^T and dS^T are operands of the products for dv and dk in the very registers in
// which they were computed, and only dS goes through shared memory once, for dq. A chunk of dout that is read for
// dout V^T is used for dv too. The first phase also computes delta while dout is read.
#include "arithmetic.cuh"
#include "schedule.cuh"

template <class A_, int TILES_, int DEPTH_, int ROW_TILES_, int CHUNK_UNITS_, int HALF_UNITS_> struct BackwardShape {
  typedef A_ A;
  static constexpr int TILES = TILES_;         // of 16 keys, and of 16 queries, that a block holds
  static constexpr int DEPTH = DEPTH_;         // channels of q and k that a tile holds
  static constexpr int ROW_TILES = ROW_TILES_; // tiles of keys of a warp
  static constexpr int WARPS = (TILES + ROW_TILES - 1) / ROW_TILES, THREADS = 32 * WARPS, ROWS = 16 * TILES;
  static constexpr int SIZE = sizeof(typename A::Element);
  static constexpr int DU = units(DEPTH * SIZE), CU = CHUNK_UNITS_, CHUNK = CU * 16 / SIZE;
  static constexpr int HALF = HALF_UNITS_ * 16 / SIZE;      // channels of dv computed at once
  // Channels of dq and dk computed at once: as many as fit in registers.
  static constexpr int WIDEST = SIZE == 8 || (SIZE == 4 && DEPTH > 64) ? 32 : 64;
  static constexpr int COLUMNS = DEPTH < WIDEST ? DEPTH : WIDEST;
  static constexpr int SU = units(ROWS * A::SHEET), RU = units(COLUMNS * SIZE);
  static constexpr int QUERY_BYTES = ROWS * 16 * DU, CHUNK_BYTES = ROWS * 16 * CU;
  static constexpr int STREAM_BYTES = 5 * CHUNK_BYTES;      // two chunks each of v and dout, one of results or out
  static constexpr int SHEET_BYTES = ROWS * 16 * SU, LATE_BYTES = SHEET_BYTES + ROWS * 16 * RU; // dS, dq and dk
  static constexpr int ROW_BYTES = ROWS * sizeof(typename A::Sum);
  static constexpr int SHARED =
      2 * QUERY_BYTES + (STREAM_BYTES > LATE_BYTES ? STREAM_BYTES : LATE_BYTES) + 2 * ROW_BYTES + ITEM_BYTES;
};

template <class B> INLINE void backward(const Arguments &a) {
  typedef typename B::A A;
  typedef typename A::Sum Sum;
  typedef typename A::Element T;
  constexpr int M = B::ROW_TILES, TILES = B::TILES, DU = B::DU, CU = B::CU, SU = B::SU, RU = B::RU;
  constexpr int CHUNK_STEPS = CU / A::STEP, DEPTH_STEPS = DU / A::STEP;
  char *const queries = shared_memory(), *const keys = queries + B::QUERY_BYTES;
  char *const values = keys + B::QUERY_BYTES, *const douts = values + 2 * B::CHUNK_BYTES;
  char *const others = douts + 2 * B::CHUNK_BYTES; // out in the first phase, later dv of the earlier lines
  char *const sheet = values, *const results = sheet + B::SHEET_BYTES;
  char *const lses = shared_memory() + B::SHARED - ITEM_BYTES - 2 * B::ROW_BYTES, *const deltas = lses + B::ROW_BYTES;
  const Item &item = next_item(a, deltas + B::ROW_BYTES);
  if (!item.exists)
    return;

  int thread = threadIdx.x;
  u32 start = item.start;
  const int warp = thread >> 5;
  const u64 depth_bytes = (u64)a.depth * B::SIZE, value_bytes = (u64)a.channels * B::SIZE;
  const u64 depth_step = item.inner * depth_bytes, value_step = item.inner * value_bytes;
  const int chunks = (a.channels + B::CHUNK - 1) / B::CHUNK;
  auto tile = [&](int m) { return min(warp * M + m, TILES - 1); };
  auto owned = [&](int m) { return TILES % M == 0 || warp * M + m < TILES; };
  auto load_chunk = [&](int c) {
    const int bytes = (int)value_bytes - c * (CU * 16);
    const u64 at = start * value_bytes + c * (CU * 16);
    load_rows<B::ROWS, CU, B::THREADS>(values + (c & 1) * B::CHUNK_BYTES,
                                       (const char *)a.v + at + item.key * value_step, value_step, item.keys, bytes, thread);
    load_rows<B::ROWS, CU, B::THREADS>(douts + (c & 1) * B::CHUNK_BYTES, (const char *)a.dout + at + item.query * value_step,
                                       value_step, item.queries, bytes, thread);
  };

  load_rows<B::ROWS, DU, B::THREADS>(queries, (const char *)a.q + start * depth_bytes + item.query * depth_step,
                                     depth_step, item.queries, (int)depth_bytes, thread);
  load_rows<B::ROWS, DU, B::THREADS>(keys, (const char *)a.k + start * depth_bytes + item.key * depth_step, depth_step,
                                     item.keys, (int)depth_bytes, thread);
  copy_commit();
  load_chunk(0);
  copy_commit();
  for (int i = thread; i < B::ROWS; i += B::THREADS) {
    const Sum lse = i < item.queries ? load_global<Sum>((const Sum *)a.lse + start + (u64)(item.query + i) * item.inner) : 0;
    store_shared<Sum>(lses + i * sizeof(Sum), lse * (Sum)LOG2_E_DOUBLE);
  }
  copy_wait<1>();
  __syncthreads();
  hide(thread);
  hide(start);

  // P^T.
  typename A::Weights weights[TILES][M];
  Sum dp[TILES][M][2][4];
  {
    const int lane = thread & 31, g = lane >> 2, t = lane & 3;
    const Sum scale = (Sum)(a.scale * LOG2_E_DOUBLE), share = (Sum)a.share;
#pragma unroll
    for (int n = 0; n < TILES; n++)
      clear(dp[n]);
#pragma unroll A::UNROLL
    for (int s = 0; s < DEPTH_STEPS; s++) {
      typename A::Rows k[M];
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template load<DU>(k[m], keys, tile(m) * 16, s * A::STEP, lane);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_rows<M, DU>(dp[n], k, queries, n * 16, s * A::STEP, lane);
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Sum lse[2];
        Pairs<Sum>::get(lse[0], lse[1], load_shared<typename Pairs<Sum>::Word>(lses + (n * 16 + half * 8 + 2 * t) * sizeof(Sum)));
#pragma unroll
        for (int m = 0; m < M; m++) {
          const int key = tile(m) * 16 + g, own = item.query == item.key ? key - 2 * t : -1000, end = item.queries - 2 * t;
          Sum(&x)[4] = dp[n][m][half];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int column = n * 16 + half * 8 + (i & 1), h = i >> 1;
            Sum e = x[i] * scale;
            if (column - 8 * h == own)
              e += share;
            x[i] = column >= end || key + 8 * h >= item.keys ? 0 : power2(e - lse[i & 1]);
          }
          weights[n][m].set(half, x);
        }
      }
#pragma unroll
    for (int n = 0; n < TILES; n++)
      clear(dp[n]);
  }

  wait_for_earlier_phases(a, item);
  for (int i = thread; i < B::ROWS; i += B::THREADS)
    store_shared<Sum>(deltas + i * sizeof(Sum), !item.first && i < item.queries
                                                    ? load_global<Sum>((const Sum *)a.delta + start + (u64)(item.query + i) * item.inner)
                                                    : 0);

  // dP^T = V dout^T, summed over the chunks of channels; dv of each chunk.
#pragma unroll 1
  for (int c = 0; c < chunks; c++) {
    hide(thread);
    hide(start);
    int lane = thread & 31;
    const int bytes = (int)value_bytes - c * (CU * 16);
    const u64 at = start * value_bytes + item.key * value_step + c * (CU * 16);
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        load_rows<16, CU, 32>(others + tile(m) * 16 * CU * 16,
                              (const char *)(item.first ? a.out : a.dv) + at + tile(m) * 16 * value_step, value_step,
                              item.keys - tile(m) * 16, bytes, lane);
    copy_commit();
    if (c + 1 < chunks)
      load_chunk(c + 1);
    copy_commit();
    char *v = values + (c & 1) * B::CHUNK_BYTES;
    const char *dout = douts + (c & 1) * B::CHUNK_BYTES;
#pragma unroll A::UNROLL
    for (int s = 0; s < CHUNK_STEPS; s++) {
      typename A::Rows r[M];
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template load<CU>(r[m], v, tile(m) * 16, s * A::STEP, lane);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_rows<M, CU>(dp[n], r, dout, n * 16, s * A::STEP, lane);
    }
    char *dv = item.first ? v : others; // a warp's own rows of v are no longer needed: results take their memory
    hide(thread);
    lane = thread & 31;
#pragma unroll
    for (int column = 0; column < B::CHUNK; column += B::HALF) {
      Sum x[M][B::HALF / 8][4];
      clear(x);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_weights<M, B::HALF / 8, CU>(x, weights[n], dout, n * 16, column, lane);
      hide(thread);
      lane = thread & 31;
      if (column == 0) {
        copy_wait<1>();
        __syncwarp();
      }
      const Sum one[2] = {1, 1};
#pragma unroll
      for (int m = 0; m < M; m++)
        if (owned(m))
          put_results<A, CU, B::HALF / 8>(dv, x[m], tile(m) * 16, column / 8, one, one, !item.first, lane);
    }
    __syncwarp();
    hide(thread);
    hide(start);
    lane = thread & 31;
    char *to = (char *)a.dv + start * value_bytes + item.key * value_step + c * (CU * 16);
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        store_rows<16, CU>(dv, tile(m) * 16, to + tile(m) * 16 * value_step, value_step, item.keys - tile(m) * 16, bytes, lane);
    if (item.first) { // delta of the warp's own rows: queries and keys are the same segment here
#pragma unroll
      for (int m = 0; m < M; m++)
        if (owned(m)) {
#pragma unroll
          for (int j = 0; j < 16 * CU / 32; j++) {
            const int row = tile(m) * 16 + j * (32 / CU) + lane / CU, at_unit = offset<CU>(row, lane % CU);
            const Unit<T, Sum> x(load_shared<uint4>(dout + at_unit)), y(load_shared<uint4>(others + at_unit));
            Sum sum = 0;
#pragma unroll
            for (int e = 0; e < Unit<T, Sum>::SIZE; e++)
              sum += x.x[e] * y.x[e];
#pragma unroll
            for (int mask = 1; mask < CU; mask *= 2)
              sum += __shfl_xor_sync(~0u, sum, mask);
            if (lane % CU == 0)
              store_shared<Sum>(deltas + row * sizeof(Sum), load_shared<Sum>(deltas + row * sizeof(Sum)) + sum);
          }
        }
    }
    __syncwarp();
  }

  hide(thread);
  hide(start);
  const int lane = thread & 31, t = lane & 3;
  if (item.first) {
#pragma unroll
    for (int m = 0; m < M; m++) {
      const int row = tile(m) * 16 + lane;
      if (owned(m) && lane < 16 && row < item.queries) {
        const u64 at = start + (u64)(item.query + row) * item.inner;
        Sum delta = load_shared<Sum>(deltas + row * sizeof(Sum));
        if (a.dlse)
          delta -= load_global<Sum>((const Sum *)a.dlse + at);
        store_shared<Sum>(deltas + row * sizeof(Sum), delta);
        store_global<Sum>((Sum *)a.delta + at, delta);
      }
    }
  }
  __syncthreads();

  // dS^T replaces P^T in registers and, for dq, goes to shared memory.
#pragma unroll
  for (int n = 0; n < TILES; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Sum delta[2];
      Pairs<Sum>::get(delta[0], delta[1], load_shared<typename Pairs<Sum>::Word>(deltas + (n * 16 + half * 8 + 2 * t) * sizeof(Sum)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        Sum p[4];
        weights[n][m].get(half, p);
#pragma unroll
        for (int i = 0; i < 4; i++) // in the padding of a line this product may be 0 times infinity
          p[i] = p[i] == 0 ? 0 : p[i] * (dp[n][m][half][i] - delta[i & 1]);
        weights[n][m].set(half, p);
      }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        A::template store_weights<SU>(sheet, weights[n][m], tile(m) * 16, 2 * n, lane);
  }
  __syncthreads();

  // dq and dk: a tile of earlier results is fetched during its product, which is added to it and written back.
  const Sum scale = (Sum)a.scale, scales[2] = {scale, scale}, one[2] = {1, 1};
#pragma unroll 1
  for (int column = 0; column < B::DEPTH; column += B::COLUMNS) {
    const int bytes = (int)depth_bytes - column * B::SIZE;
    constexpr int N = B::COLUMNS / 8;
    auto fetch = [&](const void *from, int slot, int row, int rows) {
      if (!item.first)
        load_rows<16, RU, 32>(results + slot * 16 * RU * 16,
                              (const char *)from + start * depth_bytes + row * depth_step + column * B::SIZE, depth_step,
                              rows, bytes, lane);
      copy_commit();
    };
    auto write = [&](void *to, const Sum(&x)[N][4], int slot, int row, int rows) {
      put_results<A, RU, N>(results, x, slot * 16, 0, scales, one, !item.first, lane);
      __syncwarp();
      store_rows<16, RU>(results, slot * 16, (char *)to + start * depth_bytes + row * depth_step + column * B::SIZE,
                         depth_step, rows, bytes, lane);
      __syncwarp();
    };
#pragma unroll 1
    for (int q = warp; q < TILES; q += B::WARPS) {
      Sum x[1][N][4];
      clear(x);
      fetch(a.dq, tile(0), item.query + q * 16, item.queries - q * 16);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        typename A::Weights ds[1];
        A::template load_columns<SU>(ds[0], sheet, n * 16, q * 16, lane);
        A::template multiply_weights<1, N, DU>(x, ds, keys, n * 16, column, lane);
      }
      copy_wait<0>();
      __syncwarp();
      write(a.dq, x[0], tile(0), item.query + q * 16, item.queries - q * 16);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        fetch(a.dk, tile(m), item.key + tile(m) * 16, item.keys - tile(m) * 16);
    Sum x[M][N][4];
    clear(x);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_weights<M, N, DU>(x, weights[n], queries, n * 16, column, lane);
    copy_wait<0>();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
      if (owned(m))
        write(a.dk, x[m], tile(m), item.key + tile(m) * 16, item.keys - tile(m) * 16);
  }
  finish_item(a, item);
}
