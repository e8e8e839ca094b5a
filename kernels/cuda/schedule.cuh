// The order of the work: which block computes which part of a call, and what it waits for.
//
// A criss-cross is a union of lines, one along each axis. A line longer than a block can hold is divided into segments
// of `span` positions, as queries and as keys. An item of work is a line with one of its segments as queries and one as
// keys; in forward, a call with few lines also cuts the channels of v into `cuts` items. A phase is an axis and a shift s:
// the items of all lines in which queries of segment j meet keys of segment (j + s) mod segments. Within a phase no two
// items write the same element, and the phases add to results in a fixed order. So there are no atomics on values, and
// every run gives the same bits.
//
// The phases of an image follow each other; different images are independent. Forward goes through an image that the L2
// cache does not hold in several passes, each with a part of the channels, like through so many images. Blocks take items by ticket, and images
// are staggered by `lag` phases, so that what a phase has written is still in the L2 cache when the next one reads it,
// while blocks of another image fill the GPU. Items only wait for items with lower tickets, which are running or done.
#pragma once
#include "primitives.cuh"

struct Axis {
  int length;    // positions of a line
  int inner;     // distance of neighbours on a line, in positions
  int lines;     // lines of an image
  int segments;  // segments of a line
  int span;      // positions of a segment; the last may have fewer
};

struct Arguments {
  const void *q, *k, *v;   // (images, *sizes, depth or channels)
  void *out, *lse;         // forward writes them, backward reads them
  void *scratch;           // 2 passes - 1 arrays like lse; lse itself where a line's channels are one item
  const void *dout, *dlse; // dlse may be null, for zeros
  void *delta;             // (images, *sizes): dout . out - dlse, written and read by backward
  void *dq, *dk, *dv;
  void *weights;           // (images, *sizes, neighbours): energies or weights of the two stages
  int *counters;           // the next ticket, then for each unit the items done, COUNTER_STRIDE apart: zeros before
  double scale;            // factor of the energies
  double scale_log2, share;      // scale log2(e); log2(1 / A): a position counts 1 / A on each of the A lines through it
  float scale_log2_32, share_32; // the same, so that instructions can take them from the arguments
  int images, positions;   // positions of an image
  int depth, channels;     // elements of a position in q, k and in v
  int neighbours;          // positions of a criss-cross
  int lag;                 // steps by which a phase of an image follows the one before it
  int cuts, passes;        // parts of the channels of v: of each pass, an item each; passes through an image
  int axes;                // of this launch
  int before, after;       // phases of the call in earlier launches and in later ones
  Axis axis[3];
  int slot[3];             // index, among a position's neighbours, of the first one on the axis
  int skips[3];            // whether the position itself is left out of the neighbours on the axis
  int lse_only;            // whether this launch of forward is for lse alone, with which the next one adds in L2
};

INLINE float scale_log2(const Arguments &a, float) { return a.scale_log2_32; }
INLINE double scale_log2(const Arguments &a, double) { return a.scale_log2; }
INLINE float share(const Arguments &a, float) { return a.share_32; }
INLINE double share(const Arguments &a, double) { return a.share; }

struct Item {
  int exists;
  int first;          // whether this is the first phase of all, which has nothing to add to
  int after;          // phases of the image that follow
  int image, pass;
  int unit;           // number of the pass through an image
  int wanted;         // items of this unit that must be done before this one reads or changes a result
  int axis;
  u32 start;          // position of the line's first element
  int inner;
  int query, key;     // first position of each segment on the line
  int queries, keys;  // positions of each segment
  int cut;            // which of all parts of the channels of v
  int turn;           // a number that changes from item to item
};

// Items of a phase of axis x, and of all its phases.
INLINE int phase_items(const Arguments &a, int x) { return a.axis[x].segments * a.axis[x].lines * a.cuts; }
INLINE int axis_items(const Arguments &a, int x) { return a.axis[x].segments * phase_items(a, x); }

INLINE Item item_of(const Arguments &a, int ticket) {
  int step_items = 0, phases = 0;
  for (int x = 0; x < a.axes; x++) {
    step_items += axis_items(a, x);
    phases += a.axis[x].segments;
  }
  int rest = ticket % step_items, phase = 0, before = 0, x = 0;
  for (; rest >= axis_items(a, x); x++) {
    rest -= axis_items(a, x);
    before += axis_items(a, x);
    phase += a.axis[x].segments;
  }
  const Axis axis = a.axis[x];
  const int items = phase_items(a, x), shift = rest / items, part = rest % items / a.cuts;
  const int line = part / axis.segments, segment = part % axis.segments;
  Item item;
  item.unit = ticket / step_items - (phase + shift) * a.lag;
  item.exists = item.unit >= 0 && item.unit < a.images * a.passes;
  item.image = item.unit / a.passes;
  item.pass = item.unit % a.passes;
  item.first = a.before + phase + shift == 0;
  item.after = phases - 1 - phase - shift + a.after;
  item.wanted = before + shift * items;
  item.axis = x;
  item.inner = axis.inner;
  item.start = (u32)item.image * a.positions + (u32)(line / axis.inner) * axis.length * axis.inner + line % axis.inner;
  item.query = segment * axis.span;
  item.key = (segment + shift) % axis.segments * axis.span;
  item.queries = min(axis.span, axis.length - item.query);
  item.keys = min(axis.span, axis.length - item.key);
  item.cut = item.pass * a.cuts + rest % a.cuts;
  item.turn = ticket;
  return item;
}

// What the loops over the channels are compiled for: the first phase adds to nothing, the others do, and what the last one
// reads is not needed again. (Where the first is the last, nothing is in the L2 cache that it would save.)
enum Phase { FIRST, MIDDLE, LAST };
__device__ constexpr Use use_in(Phase phase) { return phase == LAST ? LAST_USE : KEEP; }

// Takes the block's item. It stays in shared memory, at the offset `slot`, and is read from there: a copy in registers would
// cost registers of every thread.
constexpr int ITEM_BYTES = 64;
INLINE const Item &next_item(const Arguments &a, int slot) {
  static_assert(sizeof(Item) <= ITEM_BYTES, "room for an item");
  Item *const item = (Item *)(shared_memory() + slot);
  if (threadIdx.x == 0)
    *item = item_of(a, take(a.counters));
  block_barrier();
  return *item;
}

// A counter of its own on a cache line for each unit: blocks that wait for one do not hold up those that count another.
constexpr int COUNTER_STRIDE = 32;
INLINE int *counter(const Arguments &a, int unit) { return a.counters + COUNTER_STRIDE * (1 + unit); }

// Makes the block wait until the earlier phases of its unit are done.
INLINE void wait_for_earlier_phases(const Arguments &a, const Item &item) {
  if (item.wanted > 0 && threadIdx.x == 0)
    wait_until(counter(a, item.unit), item.wanted);
  block_barrier();
}

// Announces that the block's item is done: its writes are visible to blocks that wait for it.
INLINE void finish_item(const Arguments &a, const Item &item) {
  block_barrier();
  if (threadIdx.x == 0)
    announce(counter(a, item.unit));
}

// The first of a warp's `M` tiles of rows. Where a block's tiles do not divide evenly, the last of the WARPS places has
// fewer, and the warps take turns at it: a warp always runs on the same one of a multiprocessor's four schedulers.
template <int WARPS, int M> INLINE int first_tile(const Item &item) {
  int thread = threadIdx.x;
  hide(thread); // computed again where it is needed again
  return (uniform(thread >> 5) + item.turn) % WARPS * M;
}

// Calls f(tiles, tile0) for a warp's tiles, from tile0 on: `tiles.number` of them, a constant, so that f is compiled for a
// full number and, where a block's tiles do not divide evenly, for the rest.
template <int N> struct Tiles {
  static constexpr int number = N;
};
template <class Shape, class F> INLINE void with_tiles(const Item &item, F f) {
  constexpr int M = Shape::ROW_TILES, REST = Shape::TILES % M;
  const int tile0 = first_tile<Shape::WARPS, M>(item);
  if (REST == 0 || tile0 + M <= Shape::TILES)
    f(Tiles<M>(), tile0);
  else
    f(Tiles<REST ? REST : M>(), tile0);
}
