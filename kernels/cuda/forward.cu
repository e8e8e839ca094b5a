// Criss-cross attention, forward: out = sum of exp(E - lse) v and lse = log sum exp E over the lines of a position.
//
// A block computes the queries of one segment of a line with the keys of one segment of the same line:
//   1. E = scale Q K^T, 16 keys at a time, for the maximum and the sum of exponentials of each query's row.
//   2. lse of the line, merged with that of the earlier lines: that gives the factor of each row of weights.
//   3. E again, for the weights P, which stay in registers. (The energies themselves would take twice as many.)
//   4. out = P V + what the earlier lines have written, times its own factor, a chunk of channels at a time.
// A warp owns up to ROW_TILES tiles of 16 queries, so that each operand it reads from shared memory is used for all of
// them. The code for a warp's number M of tiles, and the loop of part 4 for a first and for a later phase, are compiled
// each on their own.
#include "arithmetic.cuh"
#include "schedule.cuh"

template <class A_, int TILES_, int DEPTH_, int ROW_TILES_, int CHUNK_UNITS_> struct ForwardShape {
  typedef A_ A;
  static constexpr int TILES = TILES_;         // of 16 keys, and of 16 queries, that a block holds
  static constexpr int DEPTH = DEPTH_;         // channels of q and k that a tile holds
  static constexpr int ROW_TILES = ROW_TILES_; // tiles of queries of a warp
  static constexpr int WARPS = (TILES + ROW_TILES - 1) / ROW_TILES, THREADS = 32 * WARPS, ROWS = 16 * TILES;
  static constexpr int SIZE = sizeof(typename A::Element);
  static constexpr int DU = units(DEPTH * SIZE), CU = CHUNK_UNITS_, CHUNK_BYTES = CU * 16, CHUNK = CHUNK_BYTES / SIZE;
  static constexpr int STEPS = DU / A::STEP;
  // The tiles of q and k are large enough for two tiles of results, which take their memory later.
  static constexpr int QUERY_BYTES = ROWS * 16 * (DU > CU ? DU : CU), VALUE_BYTES = ROWS * CHUNK_BYTES;
  static constexpr int SHARED = 2 * QUERY_BYTES + 2 * VALUE_BYTES + ITEM_BYTES;
};

// The rows of a warp's M tiles of queries.
template <class F, int M> struct Queries {
  typedef typename F::A A;
  static constexpr bool HOLD = A::HOLD && M * F::STEPS <= 16; // in registers
  typename A::Rows rows[HOLD ? F::STEPS : 1][M];
  u32 place;

  INLINE Queries(u32 tile, int lane) : place(tile + A::template row_place<F::DU>(lane)) {
    if (HOLD)
#pragma unroll
      for (int s = 0; s < F::STEPS; s++)
        load(rows[HOLD ? s : 0], s);
  }
  INLINE void load(typename A::Rows (&to)[M], int s) const {
#pragma unroll
    for (int m = 0; m < M; m++)
      A::template load<F::DU>(to[m], place, m * 16, s * A::STEP);
  }
  // x = their products with 16 keys, from row `row` of the tile `keys` on.
  INLINE void multiply(typename A::Sum (&x)[M][2][4], u32 keys, int row) {
    clear(x);
    constexpr int UNROLL = HOLD ? F::STEPS : A::UNROLL;
#pragma unroll UNROLL
    for (int s = 0; s < F::STEPS; s++) {
      if (!HOLD)
        load(rows[0], s);
      A::template multiply_rows<M, F::DU>(x, rows[HOLD ? s : 0], keys, row, s * A::STEP);
    }
  }
};

// What a row's weights are made of: exp2(scale E - max) factor; the earlier lines' results count `before`.
template <class Sum, int M> struct RowFactors {
  Sum max[M][2], factor[M][2], before[M][2]; // of rows g and g + 8 of each tile
};

// Parts 1 and 2 for the M tiles of queries from tile `tile0` on.
template <class F, int M>
INLINE RowFactors<typename F::A::Sum, M> row_factors(const Arguments &a, const Item &item, Queries<F, M> &queries, u32 keys,
                                                     int tile0, int lane) {
  typedef typename F::A::Sum Sum;
  const int g = lane >> 2, t = lane & 3;
  const Sum empty = -infinity(Sum());
  Sum scale = (Sum)(a.scale * LOG2_E_DOUBLE), share = (Sum)a.share;
  hide(scale);
  hide(share);
  RowFactors<Sum, M> r;
  Sum sum[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      r.max[m][h] = empty, sum[m][h] = 0;
#pragma unroll 1
  for (int n = 0; n < F::TILES; n++) {
    Sum x[M][2][4];
    queries.multiply(x, keys, n * 16);
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          x[m][half][i] *= scale;
      if (n == tile0 + m && item.query == item.key) // the rows' own keys
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (g == 2 * t + (i & 1))
            x[m][i >> 1][i] += share;
      if (n * 16 + 16 > item.keys) // the end of the line
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (n * 16 + half * 8 + 2 * t + (i & 1) >= item.keys)
              x[m][half][i] = empty;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const Sum larger = max(max(r.max[m][h], max(x[m][0][2 * h], x[m][0][2 * h + 1])), max(x[m][1][2 * h], x[m][1][2 * h + 1]));
        const Sum less = larger == empty ? 0 : larger;
        sum[m][h] *= power2(r.max[m][h] - less);
#pragma unroll
        for (int i = 0; i < 2; i++)
          sum[m][h] += power2(x[m][0][2 * h + i] - less) + power2(x[m][1][2 * h + i] - less);
        r.max[m][h] = larger;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) { // merged over the four threads of a row
#pragma unroll
      for (int mask = 1; mask < 4; mask *= 2) {
        const Sum other = __shfl_xor_sync(~0u, r.max[m][h], mask), larger = max(r.max[m][h], other);
        const Sum less = larger == empty ? 0 : larger, others = __shfl_xor_sync(~0u, sum[m][h], mask);
        sum[m][h] = sum[m][h] * power2(r.max[m][h] - less) + others * power2(other - less);
        r.max[m][h] = larger;
      }
    }

  wait_for_earlier_phases(a, item);
  // The phases of an image write lse in turn to two arrays, so that items of one phase may read what others replace.
  Sum *const to = (Sum *)(item.after & 1 ? a.scratch : a.lse);
  const Sum *const from = (const Sum *)(item.after & 1 ? a.lse : a.scratch);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = (tile0 + m) * 16 + g + 8 * h;
      const bool inside = row < item.queries;
      const Sum ln2 = (Sum)LN_2_DOUBLE, log2e = (Sum)LOG2_E_DOUBLE;
      const u64 at = item.start + (u64)(item.query + row) * item.inner;
      const Sum largest = r.max[m][h] == empty ? 0 : r.max[m][h], own = (largest + logarithm2(sum[m][h])) * ln2;
      Sum merged = own, part = 1;
      r.before[m][h] = 0;
      if (!item.first) {
        // The two parts must sum to 1, so they are computed from x and y: `merged` has a rounding error that grows with
        // the energies.
        const Sum other = inside ? load_global<Sum>(from + at) : 0, larger = max(other, own);
        if (own != empty || other != empty) {
          const Sum x = power2((own - larger) * log2e), y = power2((other - larger) * log2e);
          merged = larger + logarithm2(x + y) * ln2;
          part = x / (x + y);
          r.before[m][h] = y / (x + y);
        }
      }
      r.max[m][h] = largest;
      r.factor[m][h] = sum[m][h] == 0 ? 0 : part / sum[m][h];
      if (item.after == 0 && merged == empty) // no weight anywhere: 0 / 0
        r.factor[m][h] = __longlong_as_double(0x7ff8000000000000ll);
      __syncwarp(); // the four threads of a row have read lse before one of them writes it
      if (inside && t == 0 && item.cut == 0)
        store_global<Sum>(to + at, merged);
    }
  return r;
}

// The values of the item's keys, chunk by chunk.
template <class F> using Values = RowCopies<F::ROWS, F::CU, F::THREADS>;
template <class F> INLINE Values<F> values_of(const Arguments &a, const Item &item, u32 tile, int thread) {
  const u64 bytes = (u64)a.channels * F::SIZE, step = item.inner * bytes;
  return Values<F>(tile, (const char *)a.v + item.start * bytes + item.key * step, step, thread);
}

// Part 4: the item's channels, for the M tiles of queries from tile `tile0` on.
template <class F, int M, bool FIRST>
INLINE void sum_values(const Arguments &a, const Item &item, const typename F::A::Weights (&weights)[F::TILES][M],
                       const typename F::A::Sum (&before)[M][2], u32 queries, int tile0) {
  typedef typename F::A A;
  constexpr int TILES = F::TILES, CU = F::CU, N = F::CHUNK / 8;
  const int bytes = a.channels * F::SIZE, chunks = (bytes + F::CHUNK_BYTES - 1) / F::CHUNK_BYTES;
  const int end = chunks * (item.cut + 1) / a.cuts, rows = item.queries - tile0 * 16;
  const CachePolicy policy = cache_policy(item.after == 0);
  const u64 step = (u64)item.inner * bytes;
  const u32 values = queries + 2 * F::QUERY_BYTES, tile = tile0 * 16 * F::CHUNK_BYTES;
  int thread = threadIdx.x;
  hide(thread); // or what was computed from it for the first chunk would be kept in registers until now
  const int lane = thread & 31;
  Values<F> v = values_of<F>(a, item, values, thread);
  RowCopies<16 * M, CU, 32> out(queries + tile,
                                (char *)a.out + (u64)item.start * bytes + (item.query + tile0 * 16) * step, step, lane);
  const u32 value_place = values + A::template value_place<CU>(lane);
  const u32 result_place = queries + tile + A::template result_place<CU>(lane);
  int c = chunks * item.cut / a.cuts;
  u32 buffer = 0, results = 0; // results alternate between the tiles of q and of k
  if (!FIRST) {
    out.load(results, c * F::CHUNK_BYTES, rows, bytes, policy);
    copy_commit();
  }
#pragma unroll 1
  for (; c < end; c++) {
    copy_wait<0>();
    __syncthreads();
    const int next = (c + 1) * F::CHUNK_BYTES;
    if (c + 1 < end) {
      v.load(buffer ^ F::VALUE_BYTES, next, item.keys, bytes, policy);
      if (!FIRST)
        out.load(results ^ F::QUERY_BYTES, next, rows, bytes, policy);
    }
    copy_commit();
    typename A::Sum x[M][N][4];
    if (FIRST)
      clear(x);
    else
#pragma unroll
      for (int m = 0; m < M; m++)
        read_results<A, CU, N>(x[m], result_place + results, m * 16, 0, before[m]);
#pragma unroll
    for (int n = 0; n < TILES; n++)
      A::template multiply_weights<M, N, CU>(x, weights[n], value_place + buffer, n * 16, 0);
#pragma unroll
    for (int m = 0; m < M; m++)
      A::template store_results<CU, N>(result_place + results, x[m], m * 16, 0);
    __syncwarp();
    out.store(results, next - F::CHUNK_BYTES, rows, bytes, policy);
    if (FIRST)
      __syncwarp();
    else
      results ^= F::QUERY_BYTES;
    buffer ^= F::VALUE_BYTES;
  }
}

template <class F, int M>
INLINE void forward_tiles(const Arguments &a, const Item &item, u32 queries, int tile0) {
  typedef typename F::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = F::TILES, TILE_BYTES = 16 * F::DU * 16;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 keys = queries + F::QUERY_BYTES + A::template column_place<F::DU>(lane);
  Queries<F, M> q(queries + tile0 * TILE_BYTES, lane);
  const RowFactors<Sum, M> r = row_factors<F, M>(a, item, q, keys, tile0, lane);

  // 3. Weights. A line's last keys may be padding, with values of zeros, whose weights must be finite only: a real
  // key's exponent is never above 0. There are no branches here: the compiler would keep all energies across them.
  typename A::Weights weights[TILES][M];
  Sum scale = (Sum)(a.scale * LOG2_E_DOUBLE), share = (Sum)a.share;
  hide(scale);
  hide(share);
  const int own[2] = {item.query == item.key && g == 2 * t ? tile0 : -TILES, item.query == item.key && g == 2 * t + 1 ? tile0 : -TILES};
#pragma unroll
  for (int n = 0; n < TILES; n++) {
    Sum x[M][2][4];
    q.multiply(x, keys, n * 16);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int h = i >> 1;
          Sum e = x[m][half][i] * scale - r.max[m][h];
          if (half == h && own[i & 1] + m == n) // the row's own key
            e += share;
          x[m][half][i] = power2(at_most_zero(e)) * r.factor[m][h];
        }
        weights[n][m].set(half, x[m][half]);
      }
  }

  __syncthreads(); // results take the place of q and k
  if (item.first)
    sum_values<F, M, true>(a, item, weights, r.before, queries, tile0);
  else
    sum_values<F, M, false>(a, item, weights, r.before, queries, tile0);
}

template <class F> INLINE void forward(const Arguments &a) {
  constexpr int M = F::ROW_TILES, REST = F::TILES % M;
  const u32 queries = shared_address(shared_memory()), keys = queries + F::QUERY_BYTES, values = keys + F::QUERY_BYTES;
  const Item item = next_item(a, values + 2 * F::VALUE_BYTES);
  if (!item.exists)
    return;
  const int thread = threadIdx.x, depth_bytes = a.depth * F::SIZE, value_bytes = a.channels * F::SIZE;
  const u64 depth_step = (u64)item.inner * depth_bytes, depth_start = (u64)item.start * depth_bytes;
  const bool last_use = item.after == 0;
  const CachePolicy last_cut = cache_policy(last_use && item.cut == a.cuts - 1);
  load_rows<F::ROWS, F::DU, F::THREADS>(queries, (const char *)a.q + depth_start + item.query * depth_step, depth_step,
                                        item.queries, depth_bytes, thread, last_cut);
  load_rows<F::ROWS, F::DU, F::THREADS>(keys, (const char *)a.k + depth_start + item.key * depth_step, depth_step,
                                        item.keys, depth_bytes, thread, last_cut);
  copy_commit();
  const int chunks = (value_bytes + F::CHUNK_BYTES - 1) / F::CHUNK_BYTES;
  values_of<F>(a, item, values, thread).load(0, chunks * item.cut / a.cuts * F::CHUNK_BYTES, item.keys, value_bytes, cache_policy(last_use));
  copy_commit();
  copy_wait<1>();
  __syncthreads();

  const int tile0 = first_tile<F::WARPS, M>(item);
  if (REST == 0 || tile0 + M <= F::TILES)
    forward_tiles<F, M>(a, item, queries, tile0);
  else
    forward_tiles<F, REST ? REST : M>(a, item, queries, tile0);
  finish_item(a, item);
}
