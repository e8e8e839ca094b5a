// Accesses of known cost: lane l of each of two warps accesses byte `pitch` * l of shared memory.
#include "primitives.cuh"

struct Arguments {
  const char *in;
  char *out;
  int pitch, lanes, swizzle;
};

#define KERNEL(name) extern "C" __global__ void name(const __grid_constant__ Arguments a)

INLINE int lane() { return threadIdx.x % 32; }
INLINE u32 place(const Arguments &a, int i) { return shared_address(shared_memory()) + a.pitch * i; }

template <class V> INLINE void load(const Arguments &a) {
  if (lane() < a.lanes)
    load_shared<V>(place(a, lane()));
}
template <class V> INLINE void store(const Arguments &a) {
  if (lane() < a.lanes && threadIdx.x < 32)
    store_shared(place(a, lane()), V());
}
KERNEL(load_4) { load<float>(a); }
KERNEL(load_8) { load<float2>(a); }
KERNEL(load_16) { load<float4>(a); }
KERNEL(store_4) { store<float>(a); }
KERNEL(store_8) { store<double>(a); }
KERNEL(store_16) { store<uint4>(a); }

KERNEL(copy) {
  if (lane() < a.lanes && threadIdx.x < 32)
    copy_async<KEEP>(place(a, lane()), a.in + 16 * lane(), lane() % 4 != 0);
}

// The 16-byte units of a row of 128 bytes, permuted by the row's number if `swizzle` is set.
INLINE u32 row(const Arguments &a) {
  return place(a, lane() % 8) + 16 * (a.swizzle ? (lane() / 8) ^ (lane() % 8) : lane() / 8);
}
KERNEL(matrices) {
  u32 r[4];
  load_matrices(r, row(a));
  load_matrices_transposed(r, row(a));
}
KERNEL(stored_matrices) {
  const u32 r[4] = {};
  store_matrices(row(a), r);
}

// `lanes` elements by 32 threads: only some threads run the last iteration; then the same in another order.
KERNEL(loops) {
  if (threadIdx.x >= 32)
    return;
  for (int i = lane(); i < a.lanes; i += 32)
    store_shared(place(a, i), 1.0f);
  __syncwarp();
  for (int i = 31 - lane(); i < a.lanes; i += 32)
    load_shared<float>(place(a, i));
}

KERNEL(branches) { // half a warp each: two instructions
  if (lane() < 16)
    load_shared<float>(place(a, lane()));
  else
    load_shared<float>(place(a, lane()));
}

KERNEL(bytes) {
  store_global(a.out + 4 * threadIdx.x, load_global<float>(a.in + 4 * threadIdx.x));
  if (threadIdx.x < 3) {
    const float2 pair = load_global<float2>(a.in + 8 * threadIdx.x);
    store_global(a.out + 256 + 16 * threadIdx.x, make_float4(pair.x, pair.y, 0, 0));
  }
  copy_async<KEEP>(shared_address(shared_memory()) + 16 * threadIdx.x, a.in, threadIdx.x < 10);
}

KERNEL(products) {
  float d[4] = {};
  const u32 zeros[4] = {};
  for (int i = 0; i < 3; i++)
    matrix_multiply(f16(), d, zeros, 0, 0);
  if (threadIdx.x < 32)
    matrix_multiply(float(), d, zeros, 0, 0);
}
