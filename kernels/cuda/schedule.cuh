// The order of the work: which block computes which part of a call, and what it waits for.
//
// A criss-cross is a union of lines, one along each axis. A line longer than a block can hold is divided into segments
// of `span` positions, as queries and as keys. An item of work is a line with one of its segments as queries and one as
// keys. A phase is an axis and a shift s: the items of all lines in which queries of segment j meet keys of segment
// (j + s) mod segments. Within a phase no two items write the same element, and the phases add to results in a fixed
// order. So there are no atomics on values, and every run gives the same bits.
//
// The phases of an image follow each other; different images are independent. Blocks take items by ticket, and images
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
  const void *dout, *dlse; // dlse may be null, for zeros
  void *delta;             // (images, *sizes): dout . out - dlse, written and read by backward
  void *dq, *dk, *dv;
  void *weights;           // (images, *sizes, neighbours): energies or weights of the two stages
  int *counters;           // the next ticket, then for each image the items done: zeros before the launch
  double scale;            // factor of the energies
  double share;            // log2(1 / A): a position itself counts 1 / A on each of the A lines through it
  int images, positions;   // positions of an image
  int depth, channels;     // elements of a position in q, k and in v
  int neighbours;          // positions of a criss-cross
  int lag;                 // steps by which a phase of an image follows the one before it
  int axes;                // of this launch
  int first, last;         // whether the first and the last phase of all are in this launch
  Axis axis[3];
  int slot[3];             // index, among a position's neighbours, of the first one on the axis
  int skips[3];            // whether the position itself is left out of the neighbours on the axis
};

struct Item {
  bool exists;
  bool first, last;   // in the first phase of all, which has nothing to add to; in the last
  int image;
  int wanted;         // items of this image that must be done before this one reads or changes a result
  int axis;
  u32 start;          // position of the line's first element
  int inner;
  int query, key;     // first position of each segment on the line
  int queries, keys;  // positions of each segment
};

INLINE Item item_of(const Arguments &a, int ticket) {
  int step_items = 0;
  for (int x = 0; x < a.axes; x++)
    step_items += a.axis[x].segments * a.axis[x].segments * a.axis[x].lines;
  int rest = ticket % step_items, phase = 0, before = 0, x = 0;
  for (; rest >= a.axis[x].segments * a.axis[x].segments * a.axis[x].lines; x++) {
    rest -= a.axis[x].segments * a.axis[x].segments * a.axis[x].lines;
    before += a.axis[x].segments * a.axis[x].segments * a.axis[x].lines;
    phase += a.axis[x].segments;
  }
  const Axis axis = a.axis[x];
  const int items = axis.segments * axis.lines, shift = rest / items;
  const int line = rest % items / axis.segments, segment = rest % axis.segments;
  Item item;
  item.image = ticket / step_items - (phase + shift) * a.lag;
  item.exists = item.image >= 0 && item.image < a.images;
  item.first = a.first && phase + shift == 0;
  item.last = a.last && x == a.axes - 1 && shift == axis.segments - 1;
  item.wanted = before + shift * items;
  item.axis = x;
  item.inner = axis.inner;
  item.start = (u32)item.image * a.positions + (u32)(line / axis.inner) * axis.length * axis.inner + line % axis.inner;
  item.query = segment * axis.span;
  item.key = (segment + shift) % axis.segments * axis.span;
  item.queries = min(axis.span, axis.length - item.query);
  item.keys = min(axis.span, axis.length - item.key);
  return item;
}

// Takes the block's item. It stays in shared memory, at `slot`, and is read from there: a copy in registers would cost
// registers of every thread.
constexpr int ITEM_BYTES = 64;
INLINE const Item &next_item(const Arguments &a, char *slot) {
  static_assert(sizeof(Item) <= ITEM_BYTES, "room for an item");
  if (threadIdx.x == 0)
    *(Item *)slot = item_of(a, take(a.counters));
  __syncthreads();
  return *(const Item *)slot;
}

// Makes the block wait until the earlier phases of its image are done.
INLINE void wait_for_earlier_phases(const Arguments &a, const Item &item) {
  if (item.wanted > 0 && threadIdx.x == 0)
    wait_until(a.counters + 1 + item.image, item.wanted);
  __syncthreads();
}

// Announces that the block's item is done: its writes are visible to blocks that wait for it.
INLINE void finish_item(const Arguments &a, const Item &item) {
  __syncthreads();
  if (threadIdx.x == 0)
    announce(a.counters + 1 + item.image);
}
