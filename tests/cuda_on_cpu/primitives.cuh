// Models of the device primitives, for the machine that runs CUDA C++ on a CPU: the functions of
// kernels/cuda/primitives.cuh, with the same names and arguments. Every operation knows the source line that called it
// and names it when it fails.
#pragma once
#include "arithmetic.h"
#include "intrinsics.h"
#include "machine.h"
#include "memory.h"

typedef unsigned int u32;
typedef unsigned long long u64;

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

#define INLINE __device__ __forceinline__
#define CUDA_ON_CPU_PLACE cuda_on_cpu::Place place = cuda_on_cpu::here()

INLINE char *shared_memory() { return cuda_on_cpu::memory.shared; }
INLINE u32 shared_address(const void *p) { return u32((const char *)p - cuda_on_cpu::memory.shared); }

INLINE void block_barrier(CUDA_ON_CPU_PLACE) { __syncthreads(place); }

template <class V> INLINE V load_shared(u32 p, CUDA_ON_CPU_PLACE) { return cuda_on_cpu::read_shared<V>(p, place); }
template <class V> INLINE void store_shared(u32 p, V value, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::write_shared(p, value, place);
}
template <class V> INLINE void store_global(void *p, V value, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::write_global(p, value, place);
}
template <class V> INLINE V load_global(const void *p, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::read_global<V>(p, place);
}

enum Use { KEEP, LAST_USE };
template <Use USE> INLINE void store_global(void *p, uint4 value, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::write_global(p, value, place);
}
template <Use USE> INLINE void copy_async(u32 to, const void *from, bool valid, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::begin_copy(to, from, valid, place);
}
INLINE void copy_commit() { cuda_on_cpu::close_group(); }
template <int N> INLINE void copy_wait() { cuda_on_cpu::wait_for_copies(N); }

INLINE void load_matrices(u32 (&r)[4], u32 row, CUDA_ON_CPU_PLACE) { cuda_on_cpu::load_rows<false>(r, row, place); }
INLINE void load_matrices_transposed(u32 (&r)[4], u32 row, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::load_rows<true>(r, row, place);
}
constexpr bool STORES_MATRICES = true;
INLINE void store_matrices(u32 row, const u32 (&r)[4], CUDA_ON_CPU_PLACE) { cuda_on_cpu::store_rows(row, r, place); }

#define CUDA_ON_CPU_MULTIPLY(type, compute)                                                                    \
  INLINE void matrix_multiply(type, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, CUDA_ON_CPU_PLACE) {     \
    cuda_on_cpu::MatrixOperands operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};        \
    cuda_on_cpu::whole_warp_collective(cuda_on_cpu::count_multiply<cuda_on_cpu::compute>, &operands,           \
                                       "matrix_multiply", place);                                              \
    memcpy(d, operands.d, sizeof operands.d);                                                                  \
  }
CUDA_ON_CPU_MULTIPLY(f16, multiply_16_bit<cuda_on_cpu::widen_f16>)
CUDA_ON_CPU_MULTIPLY(bf16, multiply_16_bit<cuda_on_cpu::widen_bf16>)
CUDA_ON_CPU_MULTIPLY(float, multiply_tf32)
#undef CUDA_ON_CPU_MULTIPLY

INLINE u32 to_tf32(float x) { return cuda_on_cpu::round_tf32(x); }

INLINE u32 pack(f16, float low, float high) {
  return cuda_on_cpu::narrow_f16(low) | cuda_on_cpu::narrow_f16(high) << 16;
}
INLINE u32 pack(bf16, float low, float high) {
  return cuda_on_cpu::narrow_bf16(low) | cuda_on_cpu::narrow_bf16(high) << 16;
}
INLINE float2 unpack(f16, u32 x) { return {cuda_on_cpu::widen_f16(x & 0xffff), cuda_on_cpu::widen_f16(x >> 16)}; }
INLINE float2 unpack(bf16, u32 x) { return {cuda_on_cpu::widen_bf16(x & 0xffff), cuda_on_cpu::widen_bf16(x >> 16)}; }

template <class T> INLINE void add_global(T, void *p, uint4 x, CUDA_ON_CPU_PLACE) {
  const uint4 old = cuda_on_cpu::read_global<uint4>(p, place);
  const u32 *const a = &old.x, *const b = &x.x;
  u32 sums[4];
  for (int i = 0; i < 4; i++) {
    const float2 y = unpack(T(), a[i]), z = unpack(T(), b[i]);
    sums[i] = pack(T(), y.x + z.x, y.y + z.y);
  }
  cuda_on_cpu::write_global(p, make_uint4(sums[0], sums[1], sums[2], sums[3]), place);
}

INLINE float power2(float x) { return cuda_on_cpu::exp2_flushed(x); }
INLINE float logarithm2(float x) { return log2f(x); }
INLINE double power2(double x) { return exp2(x); }
INLINE double logarithm2(double x) { return log2(x); }

INLINE int take(int *counter, CUDA_ON_CPU_PLACE) { return cuda_on_cpu::take_ticket(counter, place); }
INLINE void announce(int *counter, CUDA_ON_CPU_PLACE) { cuda_on_cpu::announce_to(counter, place); }
INLINE void wait_until(const int *counter, int value, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::wait_for_counter(counter, value, place);
}

INLINE float divide(float x, float y) { return x / y; }
INLINE double divide(double x, double y) { return x / y; }
INLINE float at_most_zero(float x) { return x > 0 ? 0 : x; }
INLINE double at_most_zero(double x) { return x > 0 ? 0 : x; }

INLINE int uniform(int x) { return __shfl_sync(~0u, x, 0); }
INLINE void hide(int &) {}
INLINE void hide(u32 &) {}

#undef CUDA_ON_CPU_PLACE
