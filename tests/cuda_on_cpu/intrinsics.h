// The intrinsics of CUDA C++ that the kernels use: barriers of the block and of a warp, shuffles.
#pragma once
#include "machine.h"

namespace cuda_on_cpu {

struct Shuffle {
  u64 value;
  int source, lane;
};

inline void shuffle(void **arguments, u32 lanes, Place place) {
  u64 values[32];
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    values[lane] = ((Shuffle *)arguments[lane])->value;
  }
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    Shuffle &own = *(Shuffle *)arguments[__builtin_ctz(rest)];
    if (!(lanes >> own.source & 1))
      fail(place, *machine.threads[size_t(self().id - self().lane + own.lane)],
           "shuffle reads lane %d, which is not in the mask or has left the kernel", own.source);
    own.value = values[own.source];
  }
}

template <class T> T shuffle_from(u32 mask, T value, int source, const char *operation, Place place) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  Shuffle argument{0, source, self().lane};
  memcpy(&argument.value, &value, sizeof value);
  warp_collective(mask, shuffle, &argument, operation, place);
  memcpy(&value, &argument.value, sizeof value);
  return value;
}

inline void order_warp(void **, u32 lanes, Place) {
  Warp &warp = machine.warps[size_t(self().warp)];
  if (!(warp.live & ~lanes)) // the race check does not track orderings of a part of the warp
    warp.epoch++;
}

} // namespace cuda_on_cpu

inline void __syncthreads(cuda_on_cpu::Place place = cuda_on_cpu::here()) { cuda_on_cpu::block_barrier(place); }

inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Place place = cuda_on_cpu::here()) {
  cuda_on_cpu::warp_collective(mask, cuda_on_cpu::order_warp, nullptr, "__syncwarp", place);
}

// Within groups of `width` lanes, a power of two.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cuda_on_cpu::Place place = cuda_on_cpu::here()) {
  const int first = cuda_on_cpu::self().lane & ~(width - 1);
  return cuda_on_cpu::shuffle_from(mask, value, first + (source & (width - 1)), "__shfl_sync", place);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, cuda_on_cpu::Place place = cuda_on_cpu::here()) {
  const int lane = cuda_on_cpu::self().lane, source = lane ^ bits;
  const bool beyond = source >= (lane & ~(width - 1)) + width; // a later group: the lane keeps its own value
  return cuda_on_cpu::shuffle_from(mask, value, beyond ? lane : source, "__shfl_xor_sync", place);
}
