// Which block does what, and when.
//
// A criss-cross is a union of lines, one along each axis. A line longer than a block can hold is cut into segments of
// `span` positions, as queries and as keys. One item of work is one line, one segment of its queries and one of its
// keys. A phase is an axis and a shift s: the items of all lines in which queries of segment j meet keys of segment
// (j + s) mod segments. Within a phase no two items write the same place; from phase to phase results add up in a fixed
// order. So there are no atomics on values, and every run gives the same bits.
//
// Phases of one image follow each other; different images are independent. Blocks take items by ticket, images
// staggered by `lag` phases, so that what a phase leaves is still in the L2 cache when the next one reads it, while the
// blocks of another image fill the machine. Everything an item waits for has a lower ticket, so it is running or done.
#pragma once
#include "primitives.cuh"

struct Axis {
  int length;    // positions of a line
  int inner;     // positions between neighbours on a line
  int lines;     // lines of an image
  int segments;  // parts a line is cut into
  int span;      // positions of a part; the last may have fewer
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
  double share;            // log2 of the part that each of the lines through a position has in the position itself
  int images, positions;   // positions of an image
  int depth, channels;     // elements of a position in q, k and in v
  int neighbours;          // positions of a criss-cross
  int lag;                 // steps by which a phase of an image follows the one before it
  int axes;                // of this launch
  int first, last;         // whether the first and the last phase of all are in this launch
  Axis axis[3];
  int slot[3];             // where the axis's neighbours begin among those of a position
  int skips[3];            // whether the position itself is left out there
};

struct Item {
  bool exists;
  bool first, last;   // of all phases: nothing to add to yet, nothing to come
  int image;
  int wanted;         // items of this image to be done before this one reads or changes a result
  int axis;
  u32 start;          // position of the line's first element
  int inner;
  int query, key;     // first position of each segment on the line
  int queries, keys;  // positions in each
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

// Takes the block's item. It stays in shared memory, at `slot`, and is read there when needed: in registers it would be
// in every thread's.
constexpr int ITEM_BYTES = 64;
INLINE const Item &next_item(const Arguments &a, char *slot) {
  static_assert(sizeof(Item) <= ITEM_BYTES, "room for an item");
  if (threadIdx.x == 0)
    *(Item *)slot = item_of(a, take(a.counters));
  __syncthreads();
  return *(const Item *)slot;
}

// The block stops until the phases before its own are done for its image.
INLINE void wait_for_earlier_phases(const Arguments &a, const Item &item) {
  if (item.wanted > 0 && threadIdx.x == 0)
    wait_until(a.counters + 1 + item.image, item.wanted);
  __syncthreads();
}

// Everything the block has written is there for whoever waits for it.
INLINE void finish_item(const Arguments &a, const Item &item) {
  __syncthreads();
  if (threadIdx.x == 0)
    announce(a.counters + 1 + item.image);
}
