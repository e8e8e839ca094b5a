// Criss-cross attention, forward: out = sum of exp(E - lse) v and lse = log sum exp E over the lines of a position.
//
// A block computes the queries of one segment of a line with the keys of one segment of the same line:
//   1. E = scale Q K^T, 16 keys at a time, for the maximum and the sum of exponentials of each query's row.
//   2. lse of the line, merged with that of the earlier lines: that gives the factor of each row of weights.
//   3. E again, for the weights P, which stay in registers. (The energies themselves would take twice as many.)
//   4. out = P V + what the earlier lines have written, times its own factor, a chunk of channels at a time.
// A warp owns up to ROW_TILES tiles of 16 queries, so that each operand it reads from shared memory is used for all of
// them. The code for a warp's number M of tiles, and the loop of part 4 for each kind of phase, are compiled on their own.
//
// With ADDS, the phases add to out in the L2 cache instead of reading it. As a part must not be multiplied later, lse of
// the whole criss-cross must be known before: an earlier launch finds it (parts 1 and 2 alone).
#include "arithmetic.cuh"
#include "schedule.cuh"

template <class A_, int TILES_, int DEPTH_, int ROW_TILES_, int CHUNK_UNITS_, bool ADDS_> struct ForwardShape {
  typedef A_ A;
  static constexpr bool ADDS = ADDS_;          // whether later phases add in L2
  static constexpr int TILES = TILES_;         // of 16 keys, and of 16 queries, that a block holds
  static constexpr int DEPTH = DEPTH_;         // channels of q and k that a tile holds
  static constexpr int ROW_TILES = ROW_TILES_; // tiles of queries of a warp
  static constexpr int WARPS = (TILES + ROW_TILES - 1) / ROW_TILES, THREADS = 32 * WARPS, ROWS = 16 * TILES;
  static constexpr int SIZE = sizeof(typename A::Element);
  static constexpr int DU = units(DEPTH * SIZE), CU = CHUNK_UNITS_, CHUNK_BYTES = CU * 16;
  static constexpr int STEPS = DU / A::STEP;
  // The tiles of q and k are large enough for two tiles of results, which take their memory later.
  static constexpr int QUERY_BYTES = ROWS * 16 * (DU > CU ? DU : CU), VALUE_BYTES = ROWS * CHUNK_BYTES;
  static constexpr int ROW_BYTES = ROWS * sizeof(typename A::Sum);
  static constexpr int SHARED = 2 * QUERY_BYTES + 2 * VALUE_BYTES + ROW_BYTES + ITEM_BYTES;
  // Addresses in shared memory, from its start on.
  static constexpr u32 KEYS = QUERY_BYTES, VALUES = 2 * QUERY_BYTES, BEFORE = VALUES + 2 * VALUE_BYTES, ITEM = BEFORE + ROW_BYTES;
};

// The rows of a warp's M tiles of queries.
template <class F, int M> struct Queries {
  typedef typename F::A A;
  static constexpr bool HOLD = A::HOLD && M * F::STEPS <= 16 && M * (F::STEPS + F::TILES) <= 28; // in registers
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
    constexpr int UNROLL = HOLD ? F::STEPS : 1;
#pragma unroll UNROLL
    for (int s = 0; s < F::STEPS; s++) {
      if (!HOLD)
        load(rows[0], s);
      A::template multiply_rows<M, F::DU>(x, rows[HOLD ? s : 0], keys, row, s * A::STEP);
    }
  }
};

// What a row's weights are made of: exp2(scale E - max) factor. Where weights are rounded anyway, max holds the factor too.
template <class Sum, int M> struct RowFactors {
  Sum max[M][2], factor[M][2]; // of rows g and g + 8 of each tile
};

// Parts 1 and 2 for the M tiles of queries from tile `tile0` on. The factors of the earlier lines' results wait for part 4
// in shared memory, as part 3 needs all registers.
template <class F, int M>
INLINE RowFactors<typename F::A::Sum, M> row_factors(const Arguments &a, const Item &item, Queries<F, M> &queries, u32 base,
                                                     int tile0, int lane) {
  typedef typename F::A A;
  typedef typename A::Sum Sum;
  const int g = lane >> 2, t = lane & 3, end = item.keys;
  const u32 keys = base + F::KEYS + A::template column_place<F::DU>(lane);
  const Sum scale = scale_log2(a, Sum()), own_share = share(a, Sum()), empty = -infinity(Sum());
  const bool own_keys = item.query == item.key, down = scale < 0; // the row maximum is that of the greatest or least product
  auto extreme = [&](Sum x, Sum y) { return down ? min(x, y) : max(x, y); };
  RowFactors<Sum, M> r;
  Sum sum[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      r.max[m][h] = lowest(Sum()), sum[m][h] = 0; // finite: minus infinity less it is minus infinity
#pragma unroll 1
  for (int n = 0; n < F::TILES; n++) {
    Sum x[M][2][4];
    queries.multiply(x, keys, n * 16);
    if (n * 16 + 16 > end) // the end of the line
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (n * 16 + half * 8 + 2 * t + (i & 1) >= end)
              x[m][half][i] = down ? -empty : empty;
#pragma unroll
    for (int m = 0; m < M; m++) {
      const bool own = own_keys && n == tile0 + m;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const Sum most = extreme(extreme(x[m][0][2 * h], x[m][0][2 * h + 1]), extreme(x[m][1][2 * h], x[m][1][2 * h + 1]));
        const Sum before = r.max[m][h], less = max(before, most * scale);
        Sum e[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          e[i] = x[m][i >> 1][2 * h + (i & 1)] * scale - less;
        if (own) // the row's own key, in the half h
#pragma unroll
          for (int i = 0; i < 2; i++)
            if (g == 2 * t + i)
              e[2 * h + i] += own_share;
        r.max[m][h] = less;
        sum[m][h] = sum[m][h] * power2(before - less) + ((power2(e[0]) + power2(e[1])) + (power2(e[2]) + power2(e[3])));
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
        const Sum others = __shfl_xor_sync(~0u, sum[m][h], mask);
        sum[m][h] = sum[m][h] * power2(r.max[m][h] - larger) + others * power2(other - larger);
        r.max[m][h] = larger;
      }
    }

  wait_for_earlier_phases(a, item);
  // The phases of a unit write lse in turn to two arrays, so that items of one phase may read what others replace.
  const u64 all = (u64)a.images * a.positions;
  Sum *const last = item.pass ? (Sum *)a.scratch + (2 * item.pass - 1) * all : (Sum *)a.lse;
  Sum *const other = (Sum *)a.scratch + 2 * item.pass * all;
  Sum *const to = (item.after & 1 ? other : last) + item.start;
  const Sum *const from = (item.after & 1 ? last : other) + item.start;
  const int first_row = item.query + tile0 * 16 + g, rows = item.queries - tile0 * 16 - g;
  Sum earlier[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      earlier[m][h] = !item.first && m * 16 + 8 * h < rows ? load_global<Sum>(from + (u64)(first_row + m * 16 + 8 * h) * item.inner) : empty;
  __syncwarp(); // the four threads of a row have read lse before one of them writes it
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const Sum own = (r.max[m][h] + logarithm2(sum[m][h])) * (Sum)LN_2_DOUBLE, before = earlier[m][h];
      const Sum larger = max(own, before) == empty ? 0 : max(own, before);
      // The parts of this line and of the earlier ones must sum to 1, so they are computed from x and y: `merged` has a
      // rounding error that grows with the energies.
      const Sum x = power2((own - larger) * (Sum)LOG2_E_DOUBLE), y = power2((before - larger) * (Sum)LOG2_E_DOUBLE);
      const Sum merged = larger + logarithm2(x + y) * (Sum)LN_2_DOUBLE;
      const Sum inverse = x + y == 0 ? 0 : divide((Sum)1, x + y);
      Sum factor = sum[m][h] == 0 ? 0 : divide(x * inverse, sum[m][h]);
      if (item.after == 0 && merged == empty) // no weight anywhere: 0 / 0
        factor = __longlong_as_double(0x7ff8000000000000ll);
      if (A::ROUNDS)
        r.max[m][h] -= logarithm2(factor);
      r.factor[m][h] = factor;
      if (t == 0) {
        store_shared<Sum>(base + F::BEFORE + (tile0 * 16 + m * 16 + g + 8 * h) * sizeof(Sum), y * inverse);
        if (m * 16 + 8 * h < rows && item.cut == item.pass * a.cuts)
          store_global<Sum>(to + (u64)(first_row + m * 16 + 8 * h) * item.inner, merged);
      }
    }
  return r;
}

// The same where lse of the whole criss-cross is known.
template <class F, int M>
INLINE RowFactors<typename F::A::Sum, M> known_factors(const Arguments &a, const Item &item, int tile0, int g) {
  typedef typename F::A::Sum Sum;
  RowFactors<Sum, M> r;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = (tile0 + m) * 16 + g + 8 * h;
      const Sum *const lse = (const Sum *)a.lse + item.start + (u64)(item.query + row) * item.inner;
      r.max[m][h] = row < item.queries ? load_global<Sum>(lse) * (Sum)LOG2_E_DOUBLE : 0;
      r.factor[m][h] = 1;
    }
  wait_for_earlier_phases(a, item);
  return r;
}

// Part 4: the item's channels, for the M tiles of queries from tile `tile0` on.
template <class F, int M, Phase PHASE>
INLINE void sum_values(const Arguments &a, const Item &item, const typename F::A::Weights (&weights)[F::TILES][M],
                       u32 base) {
  typedef typename F::A A;
  typedef typename A::Sum Sum;
  constexpr Use USE = use_in(PHASE);
  constexpr bool READS = PHASE != FIRST && !F::ADDS; // the earlier phases' results, to add to them
  const int tile0 = first_tile<F::WARPS, F::ROW_TILES>(item);
  constexpr int TILES = F::TILES, CU = F::CU, HALF = A::ROUNDS ? CU / M : CU, N = HALF * 16 / F::SIZE / 8;
  const int bytes = a.channels * F::SIZE, chunks = (bytes + F::CHUNK_BYTES - 1) / F::CHUNK_BYTES;
  const int parts = a.cuts * a.passes, end = chunks * (item.cut + 1) / parts, rows = item.queries - tile0 * 16, keys = item.keys;
  const u32 units = bytes / 16, step = item.inner * units;
  const u32 tile = base + tile0 * 16 * F::CHUNK_BYTES; // in that of q, which results replace
  int thread = threadIdx.x;
  hide(thread); // or what was computed from it for the first chunk would be kept in registers until now
  const int lane = thread & 31;
  const RowCopies<F::ROWS, CU, F::THREADS> values(base + F::VALUES, thread);
  const RowCopies<16 * M, CU, 32> results(tile, lane); // the warp's own rows
  const u32 v = values.at(item.start * units + item.key * step, step);
  const u32 out = results.at(item.start * units + (item.query + tile0 * 16) * step, step);
  const u32 value_place = base + F::VALUES + A::template value_place<CU>(lane);
  const u32 result_place = tile + A::template result_place<CU>(lane);
  Sum before[M][2];
  if (READS)
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        before[m][h] = load_shared<Sum>(base + F::BEFORE + ((tile0 + m) * 16 + (lane >> 2) + 8 * h) * sizeof(Sum));
  int c = chunks * item.cut / parts;
  u32 buffer = 0, side = 0; // results alternate between the tiles of q and of k
  if (READS) {
    results.template load<USE>(side, a.out, out, step, c * F::CHUNK_BYTES, rows, bytes);
    copy_commit();
  }
#pragma unroll 1
  for (; c < end; c++) {
    copy_wait<0>();
    block_barrier();
    const int next = (c + 1) * F::CHUNK_BYTES;
    if (c + 1 < end) {
      values.template load<USE>(buffer ^ F::VALUE_BYTES, a.v, v, step, next, keys, bytes);
      if (READS)
        results.template load<USE>(side ^ F::QUERY_BYTES, a.out, out, step, next, rows, bytes);
    }
    copy_commit();
#pragma unroll
    for (int half = 0; half < CU; half += HALF) { // fewer sums at once need fewer registers
      Sum x[M][N][4];
      if (!READS)
        clear(x);
      else
#pragma unroll
        for (int m = 0; m < M; m++)
          read_results<A, CU, N>(x[m], result_place + side, m * 16, half, before[m]);
#pragma unroll
      for (int n = 0; n < TILES; n++)
        A::template multiply_weights<M, N, CU>(x, weights[n], value_place + buffer, n * 16, half);
#pragma unroll
      for (int m = 0; m < M; m++)
        A::template store_results<CU, N>(result_place + side, x[m], m * 16, half);
    }
    __syncwarp();
    if constexpr (PHASE != FIRST && F::ADDS)
      results.template add<typename A::Element>(side, a.out, out, step, next - F::CHUNK_BYTES, rows, bytes);
    else
      results.template store<USE>(side, a.out, out, step, next - F::CHUNK_BYTES, rows, bytes);
    if (READS)
      side ^= F::QUERY_BYTES;
    else
      __syncwarp();
    buffer ^= F::VALUE_BYTES;
  }
}

template <class F, int M>
INLINE void forward_tiles(const Arguments &a, const Item &item, u32 base, int tile0) {
  typedef typename F::A A;
  typedef typename A::Sum Sum;
  constexpr int TILES = F::TILES;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  Queries<F, M> q(base + tile0 * 16 * F::DU * 16, lane);
  RowFactors<Sum, M> r;
  if (!F::ADDS || a.lse_only)
    r = row_factors<F, M>(a, item, q, base, tile0, lane);
  else
    r = known_factors<F, M>(a, item, tile0, g);
  if (F::ADDS && a.lse_only)
    return;

  // 3. Weights. A line's last keys may be padding, with values of zeros, whose weights must be finite only: a real
  // key's exponent is never above 0. There are no branches here: the compiler would keep all energies across them.
  typename A::Weights weights[TILES][M];
  const u32 keys = base + F::KEYS + A::template column_place<F::DU>(lane);
  const Sum scale = scale_log2(a, Sum()), own_share = share(a, Sum());
  const bool own[2] = {item.query == item.key && g == 2 * t, item.query == item.key && g == 2 * t + 1};
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
          if (half == h && m == n % M && own[i & 1] && n == tile0 + m) // the row's own key; tile0 is a multiple of M
            e += own_share;
          x[m][half][i] = power2(at_most_zero(e));
          if (!A::ROUNDS)
            x[m][half][i] *= r.factor[m][h];
        }
        weights[n][m].set(half, x[m][half]);
      }
  }

  block_barrier(); // results take the place of q and k
  if (item.first)
    sum_values<F, M, FIRST>(a, item, weights, base);
  else if (item.after > 0)
    sum_values<F, M, MIDDLE>(a, item, weights, base);
  else
    sum_values<F, M, LAST>(a, item, weights, base);
}

template <class F> INLINE void forward(const Arguments &a) {
  const u32 base = shared_address(shared_memory());
  const Item &item = next_item(a, F::ITEM);
  if (!item.exists)
    return;
  const int thread = threadIdx.x, depth_bytes = a.depth * F::SIZE, value_bytes = a.channels * F::SIZE;
  const u64 depth_step = (u64)item.inner * depth_bytes, depth_start = (u64)item.start * depth_bytes;
  const u32 units = value_bytes / 16, step = item.inner * units;
  const int parts = a.cuts * a.passes;
  const bool lse_only = F::ADDS && a.lse_only, last_cut = item.after == 0 && item.cut == parts - 1 && !lse_only;
  load_rows<F::ROWS, F::DU, F::THREADS>(base, (const char *)a.q + depth_start + item.query * depth_step, depth_step,
                                        item.queries, depth_bytes, thread, last_cut);
  load_rows<F::ROWS, F::DU, F::THREADS>(base + F::KEYS, (const char *)a.k + depth_start + item.key * depth_step, depth_step,
                                        item.keys, depth_bytes, thread, last_cut);
  copy_commit();
  const int chunks = (value_bytes + F::CHUNK_BYTES - 1) / F::CHUNK_BYTES;
  const RowCopies<F::ROWS, F::CU, F::THREADS> values(base + F::VALUES, thread);
  if (!lse_only)
    values.template load<KEEP>(0, a.v, values.at(item.start * units + item.key * step, step), step,
                               chunks * item.cut / parts * F::CHUNK_BYTES, item.keys, value_bytes);
  copy_commit();
  copy_wait<1>();
  block_barrier();

  with_tiles<F>(item, [&](auto tiles, int tile0) { forward_tiles<F, tiles.number>(a, item, base, tile0); });
  finish_item(a, item);
}
