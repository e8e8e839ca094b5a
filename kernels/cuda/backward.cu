// Criss-cross attention, backward: with P = exp(E - lse) and delta_u = dout_u . out_u - dlse_u, over the lines,
//   dv += P^T dout,   dS = P (dout V^T - delta),   dq += scale dS K,   dk += scale dS^T Q.
//
// A block computes the queries of one segment of a line with the keys of one segment of the same line. All products are
// transposed, with keys as rows: so P^T and dS^T are operands of the products for dv and dk in the very registers in
// which they were computed, and only dS goes through shared memory once, for dq. A chunk of dout that is read for
// dout V^T is used for dv too. The first phase also computes delta while dout is read. As in forward.cu, the code for a
// warp's number M of tiles of keys, and the loop over the chunks for each kind of phase, are compiled on their own.
#include "arithmetic.cuh"
#include "schedule.cuh"

template <class A_, int TILES_, int DEPTH_, int ROW_TILES_, int CHUNK_UNITS_, int HALF_UNITS_, bool ADDS_> struct BackwardShape {
  typedef A_ A;
  static constexpr bool ADDS = ADDS_;          // whether later phases add in L2, instead of reading results
  static constexpr int TILES = TILES_;         // of 16 keys, and of 16 queries, that a block holds
  static constexpr int DEPTH = DEPTH_;         // channels of q and k that a tile holds
  static constexpr int ROW_TILES = ROW_TILES_; // tiles of keys of a warp
  static constexpr int WARPS = (TILES + ROW_TILES - 1) / ROW_TILES, THREADS = 32 * WARPS, ROWS = 16 * TILES;
  static constexpr int SIZE = sizeof(typename A::Element);
  static constexpr int DU = units(DEPTH * SIZE), CU = CHUNK_UNITS_, CHUNK_BYTES = CU * 16;
  static constexpr int HALF_UNITS = HALF_UNITS_;            // units of a row of dv computed at once
  // Channels of dq and dk computed at once: as many as fit in registers.
  static constexpr int WIDEST = SIZE == 8 || (SIZE == 4 && DEPTH > 64) ? 32 : 64;
  static constexpr int COLUMNS = DEPTH < WIDEST ? DEPTH : WIDEST;
  static constexpr int SU = units(ROWS * A::SHEET), RU = units(COLUMNS * SIZE);
  static constexpr int QUERY_BYTES = ROWS * 16 * DU, VALUE_BYTES = ROWS * CHUNK_BYTES;
  static constexpr int STREAM_BYTES = 5 * VALUE_BYTES;      // two chunks each of v and dout, one of results or out
  static constexpr int SHEET_BYTES = ROWS * 16 * SU, LATE_BYTES = SHEET_BYTES + ROWS * 16 * RU; // dS, dq and dk
  static constexpr int ROW_BYTES = ROWS * sizeof(typename A::Sum);
  static constexpr int SHARED =
      2 * QUERY_BYTES + (STREAM_BYTES > LATE_BYTES ? STREAM_BYTES : LATE_BYTES) + 2 * ROW_BYTES + ITEM_BYTES;
  // Addresses in shared memory, from its start on.
  static constexpr u32 KEYS = QUERY_BYTES, VALUES = 2 * QUERY_BYTES, DOUTS = VALUES + 2 * VALUE_BYTES;
  static constexpr u32 OTHERS = DOUTS + 2 * VALUE_BYTES; // out in the first phase, later dv of the earlier lines
  static constexpr u32 SHEET = VALUES, RESULTS = SHEET + SHEET_BYTES;
  static constexpr u32 ITEM = SHARED - ITEM_BYTES, DELTAS = ITEM - ROW_BYTES, LSES = DELTAS - ROW_BYTES;
};

// Starts copying the chunk of v of the keys and of dout of the queries that lies `skip` bytes into their rows; `v` and
// `dout` are the thread's places in these arrays.
template <class B, Use USE>
INLINE void load_chunk(const Arguments &a, const RowCopies<B::ROWS, B::CU, B::THREADS> &copies, u32 buffer, u32 v, u32 dout,
                       u32 step, int skip, int keys, int queries, int bytes) {
  copies.template load<USE>(B::VALUES + buffer, a.v, v, step, skip, keys, bytes);
  copies.template load<USE>(B::DOUTS + buffer, a.dout, dout, step, skip, queries, bytes);
}

// P^T of the M tiles of keys from tile `tile0` on. The places of padding need no care but that their weights are finite:
// there the rows of k and dout are zeros, so whatever is multiplied with their weights or dS vanishes.
template <class B, int M>
INLINE void probabilities(const Arguments &a, const Item &item, typename B::A::Probabilities (&weights)[B::TILES][M], u32 base,
                          int tile0, int lane) {
  typedef typename B::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = B::TILES, DU = B::DU;
  const int g = lane >> 2, t = lane & 3;
  const Sum scale = scale_log2(a, Sum()), own_share = share(a, Sum());
  const u32 rows = base + B::KEYS + tile0 * 16 * DU * 16 + A::template row_place<DU>(lane), columns = base + A::template column_place<DU>(lane);
  const bool own[2] = {item.query == item.key && g == 2 * t, item.query == item.key && g == 2 * t + 1};
  Sum x[TILES][M][2][4];
#pragma unroll
  for (int n = 0; n < TILES; n++)
    clear(x[n]);
#pragma unroll A::UNROLL
  for (int s = 0; s < DU / A::STEP; s++) {
    typename A::Rows k[M];
#pragma unroll
    for (int m = 0; m < M; m++)
      A::template load<DU>(k[m], rows, m * 16, s * A::STEP);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_rows<M, DU>(x[n], k, columns, n * 16, s * A::STEP);
  }
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Sum lse[2];
      Pairs<Sum>::get(lse[0], lse[1],
                      load_shared<typename Pairs<Sum>::Word>(base + B::LSES + (n * 16 + half * 8 + 2 * t) * sizeof(Sum)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        Sum(&p)[4] = x[n][m][half];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          Sum e = p[i] * scale - lse[i & 1];
          if (half == i >> 1 && m == n % M && own[i & 1] && n == tile0 + m) // the key's own query; tile0 is a multiple of M
            e += own_share;
          p[i] = power2(at_most_zero(e));
        }
        weights[n][m].set(half, p);
      }
    }
}

// dP^T = V dout^T, summed over the chunks of channels, and dv of each chunk, for the M tiles of keys from tile `tile0` on.
// The first phase also puts delta in shared and global memory, for the same positions as queries.
template <class B, int M, Phase PHASE>
INLINE void sum_chunks(const Arguments &a, const Item &item, typename B::A::Sum (&dp)[B::TILES][M][2][4],
                       const typename B::A::Probabilities (&weights)[B::TILES][M], u32 base) {
  typedef typename B::A A;
  typedef typename A::Sum Sum;
  constexpr bool FIRST_PHASE = PHASE == FIRST;
  constexpr bool READS = PHASE != FIRST && !B::ADDS; // the earlier phases' results, to add to them
  constexpr Use USE = use_in(PHASE);
  constexpr int TILES = B::TILES, CU = B::CU, N = B::HALF_UNITS * 16 / B::SIZE / 8;
  // Steps by which the loop over a row is unrolled: beyond them the compiler loads ahead, for which it lacks registers.
  constexpr int AHEAD = B::SIZE == 2 && TILES < 8 ? 2 : 1;
  const int tile0 = first_tile<B::WARPS, B::ROW_TILES>(item);
  const int bytes = a.channels * B::SIZE, keys = item.keys, queries = FIRST_PHASE ? keys : item.queries, rows = keys - tile0 * 16;
  int thread = threadIdx.x;
  hide(thread); // or what was computed from it for the first chunk would be kept in registers until now
  const int lane = thread & 31;
  const u32 own = tile0 * 16 * B::CHUNK_BYTES;
  const RowCopies<B::ROWS, CU, B::THREADS> copies(base, thread);
  const RowCopies<16 * M, CU, 32> results(base + own, lane); // the warp's own rows
  const u32 units = bytes / 16, step = item.inner * units, start = item.start * units;
  const u32 v = copies.at(start + item.key * step, step), dout = FIRST_PHASE ? v : copies.at(start + item.query * step, step);
  const u32 dv = results.at(start + (item.key + tile0 * 16) * step, step); // and out, in the first phase
  u32 row_place = base + B::VALUES + own + A::template row_place<CU>(lane);
  u32 column_place = base + B::DOUTS + A::template column_place<CU>(lane);
  u32 value_place = base + B::DOUTS + A::template value_place<CU>(lane);
  u32 result_place = base + own + A::template result_place<CU>(lane);
  typename A::template RowProducts<CU> delta[FIRST_PHASE ? M : 1];
  u32 buffer = 0;
#pragma unroll 1
  for (int skip = 0; skip < bytes; skip += B::CHUNK_BYTES) {
    hide(row_place), hide(column_place), hide(value_place), hide(result_place); // as in RowCopies
    copy_wait<0>();
    block_barrier();
    if (FIRST_PHASE || READS)
      results.template load<FIRST_PHASE ? LAST_USE : USE>(B::OTHERS, FIRST_PHASE ? a.out : a.dv, dv, step, skip, rows, bytes);
    copy_commit();
    if (skip + B::CHUNK_BYTES < bytes)
      load_chunk<B, USE>(a, copies, buffer ^ B::VALUE_BYTES, v, dout, step, skip + B::CHUNK_BYTES, keys, queries, bytes);
    copy_commit();
#pragma unroll AHEAD
    for (int s = 0; s < CU / A::STEP; s++) {
      typename A::Rows v[M];
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template load<CU>(v[m], row_place + buffer, m * 16, s * A::STEP);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_rows<M, CU>(dp[n], v, column_place + buffer, n * 16, s * A::STEP);
    }
    copy_wait<1>();
    __syncwarp();
    // A warp's own rows of v, which are no longer needed, take the results, unless these are added to earlier ones.
    const u32 tile = READS ? B::OTHERS : B::VALUES + buffer;
    if (FIRST_PHASE) {
      int same_lane = lane;
      hide(same_lane);
#pragma unroll
      for (int m = 0; m < M; m++) {
        const u32 rows_of_tile = base + own + m * 16 * B::CHUNK_BYTES;
        delta[m].add(rows_of_tile + B::DOUTS + buffer, rows_of_tile + B::OTHERS, same_lane);
      }
    }
#pragma unroll 1
    for (int half = 0; half < CU; half += B::HALF_UNITS) {
      Sum x[M][N][4];
      if (!READS)
        clear(x);
      else
#pragma unroll
        for (int m = 0; m < M; m++)
          read_results<A, CU, N>(x[m], result_place + tile, m * 16, half);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_weights<M, N, CU>(x, weights[n], value_place + buffer, n * 16, half);
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template store_results<CU, N>(result_place + tile, x[m], m * 16, half);
    }
    __syncwarp();
    if constexpr (PHASE != FIRST && B::ADDS)
      results.template add<typename A::Element>(tile, a.dv, dv, step, skip, rows, bytes);
    else
      results.template store<USE>(tile, a.dv, dv, step, skip, rows, bytes);
    buffer ^= B::VALUE_BYTES;
  }
  if (FIRST_PHASE) {
#pragma unroll
    for (int m = 0; m < M; m++)
      delta[m].each(lane, [&](int row, Sum sum) {
        row += (tile0 + m) * 16;
        const u64 at = item.start + (u64)(item.query + row) * item.inner;
        if (a.dlse && row < item.queries)
          sum -= load_global<Sum>((const Sum *)a.dlse + at);
        store_shared<Sum>(base + B::DELTAS + row * sizeof(Sum), sum);
        if (row < item.queries)
          store_global<Sum>((Sum *)a.delta + at, sum);
      });
  }
}

// dq and dk. A tile of earlier results is fetched during its product, which is added to it and written back.
template <class B, int M>
INLINE void gradients_of_energies(const Arguments &a, const Item &item, const typename B::A::Weights (&ds)[B::TILES][M], u32 base,
                                  int lane) {
  typedef typename B::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = B::TILES, DU = B::DU, RU = B::RU, SU = B::SU, N = B::COLUMNS / 8;
  const int tile0 = first_tile<B::WARPS, B::ROW_TILES>(item);
  const Sum scale = (Sum)a.scale;
  const int depth_bytes = a.depth * B::SIZE;
  const u32 step = item.inner * (depth_bytes / 16), start = item.start * (depth_bytes / 16);
  const u32 results = base + B::RESULTS + tile0 * 16 * RU * 16, result_place = results + A::template result_place<RU>(lane);
  const RowCopies<16, RU, 32> copies(results, lane);
  const u32 value_place = base + A::template value_place<DU>(lane);
  const u32 sheet = base + B::SHEET + A::template transposed_place<SU>(lane);
#pragma unroll 1
  for (int column = 0; column < B::DEPTH; column += B::COLUMNS) {
    const int skip = column * B::SIZE;
    auto fetch = [&](const void *x, int row, int rows, int m) {
      if (!item.first && !B::ADDS)
        copies.template load<KEEP>(m * 16 * RU * 16, x, copies.at(start + row * step, step), step, skip, rows, depth_bytes);
    };
    auto write = [&](void *x, Sum(&sum)[N][4], int row, int rows, int m) {
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          sum[n][i] *= scale;
      if (!item.first && !B::ADDS)
        A::template each_result<RU, N>(result_place, m * 16, 0, [&](int n, int i, Sum old) { sum[n][i] += old; });
      A::template store_results<RU, N>(result_place, sum, m * 16, 0);
      __syncwarp();
      if constexpr (B::ADDS) {
        if (!item.first) {
          copies.template add<typename A::Element>(m * 16 * RU * 16, x, copies.at(start + row * step, step), step, skip, rows, depth_bytes);
          __syncwarp();
          return;
        }
      }
      copies.template store<KEEP>(m * 16 * RU * 16, x, copies.at(start + row * step, step), step, skip, rows, depth_bytes);
      __syncwarp();
    };
#pragma unroll 1
    for (int q = tile0 / B::ROW_TILES; q < TILES; q += B::WARPS) {
      fetch(a.dq, item.query + q * 16, item.queries - q * 16, 0);
      copy_commit();
      Sum x[1][N][4];
      clear(x);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        typename A::Weights w[1];
        A::template load_transposed<SU>(w[0], sheet, n * 16, q * A::SHEET);
        A::template multiply_weights<1, N, DU>(x, w, value_place + B::KEYS + skip, n * 16, 0);
      }
      copy_wait<0>();
      __syncwarp();
      write(a.dq, x[0], item.query + q * 16, item.queries - q * 16, 0);
    }
#pragma unroll
    for (int m = 0; m < M; m++)
      fetch(a.dk, item.key + (tile0 + m) * 16, item.keys - (tile0 + m) * 16, m);
    copy_commit();
    Sum x[M][N][4];
    clear(x);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_weights<M, N, DU>(x, ds[n], value_place + skip, n * 16, 0);
    copy_wait<0>();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
      write(a.dk, x[m], item.key + (tile0 + m) * 16, item.keys - (tile0 + m) * 16, m);
  }
}

template <class B, int M> INLINE void backward_tiles(const Arguments &a, const Item &item, u32 base, int tile0) {
  typedef typename B::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = B::TILES, SU = B::SU;
  const int lane = threadIdx.x & 31, t = lane & 3;
  typename A::Probabilities weights[TILES][M];
  probabilities<B, M>(a, item, weights, base, tile0, lane);
  wait_for_earlier_phases(a, item);
  for (int i = threadIdx.x; !item.first && i < B::ROWS; i += B::THREADS)
    store_shared<Sum>(base + B::DELTAS + i * sizeof(Sum),
                      i < item.queries ? load_global<Sum>((const Sum *)a.delta + item.start + (u64)(item.query + i) * item.inner) : 0);
  Sum dp[TILES][M][2][4];
#pragma unroll
  for (int n = 0; n < TILES; n++)
    clear(dp[n]);
  if (item.first)
    sum_chunks<B, M, FIRST>(a, item, dp, weights, base);
  else if (item.after > 0)
    sum_chunks<B, M, MIDDLE>(a, item, dp, weights, base);
  else
    sum_chunks<B, M, LAST>(a, item, dp, weights, base);
  block_barrier();

  // dS^T stays in registers for dk and goes to shared memory for dq.
  typename A::Weights ds[TILES][M];
  const u32 sheet = base + B::SHEET + first_tile<B::WARPS, B::ROW_TILES>(item) * 16 * SU * 16 + A::template weight_place<SU>(lane);
#pragma unroll
  for (int n = 0; n < TILES; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Sum delta[2];
      Pairs<Sum>::get(delta[0], delta[1],
                      load_shared<typename Pairs<Sum>::Word>(base + B::DELTAS + (n * 16 + half * 8 + 2 * t) * sizeof(Sum)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        Sum p[4];
        weights[n][m].get(half, p);
#pragma unroll
        for (int i = 0; i < 4; i++)
          p[i] *= dp[n][m][half][i] - delta[i & 1];
        ds[n][m].set(half, p);
      }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
      A::template store_weights<SU>(sheet, ds[n][m], m * 16, n * A::SHEET);
  }
  block_barrier();
  gradients_of_energies<B, M>(a, item, ds, base, lane);
}

template <class B> INLINE void backward(const Arguments &a) {
  typedef typename B::A::Sum Sum;
  const u32 base = shared_address(shared_memory());
  const Item &item = next_item(a, B::ITEM);
  if (!item.exists)
    return;
  const int thread = threadIdx.x, depth_bytes = a.depth * B::SIZE, value_bytes = a.channels * B::SIZE;
  const u64 depth_step = (u64)item.inner * depth_bytes, depth_start = (u64)item.start * depth_bytes;
  const bool last_use = item.after == 0;
  load_rows<B::ROWS, B::DU, B::THREADS>(base, (const char *)a.q + depth_start + item.query * depth_step, depth_step,
                                        item.queries, depth_bytes, thread, last_use);
  load_rows<B::ROWS, B::DU, B::THREADS>(base + B::KEYS, (const char *)a.k + depth_start + item.key * depth_step, depth_step,
                                        item.keys, depth_bytes, thread, last_use);
  copy_commit();
  const RowCopies<B::ROWS, B::CU, B::THREADS> copies(base, thread);
  const u32 units = value_bytes / 16, step = item.inner * units, start = item.start * units;
  load_chunk<B, KEEP>(a, copies, 0, copies.at(start + item.key * step, step), copies.at(start + item.query * step, step), step,
                      0, item.keys, item.queries, value_bytes);
  copy_commit();
  for (int i = thread; i < B::ROWS; i += B::THREADS) {
    const Sum lse = i < item.queries ? load_global<Sum>((const Sum *)a.lse + item.start + (u64)(item.query + i) * item.inner) : 0;
    store_shared<Sum>(base + B::LSES + i * sizeof(Sum), lse * (Sum)LOG2_E_DOUBLE);
  }
  copy_wait<1>();
  block_barrier();

  with_tiles<B>(item, [&](auto tiles, int tile0) { backward_tiles<B, tiles.number>(a, item, base, tile0); });
  finish_item(a, item);
}
