// The GPU's instructions that the kernels use, each behind one small function.
//
// Everything else in this folder is plain C++ on top of these and of __syncwarp and the shuffles. No CUDA header is
// included, so NVRTC compiles the sources without a CUDA toolkit. The tests run the same sources on a CPU with a file of
// models of these functions as a drop-in replacement.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

#define INLINE __device__ __forceinline__

// What the compiler is told (-D NAME=VALUE), besides the architecture:
//   CCGPU_HINTS       0: accesses do not tell the L2 cache which of them are the last to a line (default 1)
//   CCGPU_WAIT_LIMIT  a block that has looked at a counter this many times in vain ends the launch with an error, instead
//                     of hanging (default 0: never)
#ifndef CCGPU_HINTS
#define CCGPU_HINTS 1
#endif
#ifndef CCGPU_WAIT_LIMIT
#define CCGPU_WAIT_LIMIT 0
#endif

// Shared memory; its size is given at the launch. Its addresses are numbers, which makes them cheap to compute with: tiles
// are aligned to 128 bytes, so exclusive or moves an address within a row.
extern __shared__ __align__(1024) char ccgpu_shared_memory[];
INLINE char *shared_memory() { return ccgpu_shared_memory; }
INLINE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// A barrier of the block, at which warps may arrive from different places in the code, as __syncthreads does not allow.
INLINE void block_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }

// Reads and writes of 4, 8 or 16 aligned bytes of shared memory.
template <class V> INLINE V load_shared(u32 p) {
  u32 words[sizeof(V) / 4];
  if constexpr (sizeof(V) == 16)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(p)
                 : "memory");
  else if constexpr (sizeof(V) == 8)
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(p) : "memory");
  else
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(p) : "memory");
  V value;
  memcpy(&value, words, sizeof(V));
  return value;
}
template <class V> INLINE void store_shared(u32 p, V value) {
  u32 words[sizeof(V) / 4];
  memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == 16)
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  else if constexpr (sizeof(V) == 8)
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(p), "r"(words[0]), "r"(words[1]) : "memory");
  else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(p), "r"(words[0]) : "memory");
}

// Reads and writes of 4, 8 or 16 aligned bytes of global memory. Reads bypass the L1 cache, which does not see what other
// blocks have written while this one ran.
template <class V> INLINE void store_global(void *p, V value) { *(V *)p = value; }
template <class V> INLINE V load_global(const void *p) { return __ldcg((const V *)p); }

// Whether an access is the last one to its line: the L2 cache then gives it up before all others.
enum Use { KEEP, LAST_USE };

INLINE u64 evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
template <Use USE> INLINE void store_global(void *p, uint4 x) {
#if __CUDA_ARCH__ >= 800 && CCGPU_HINTS
  if constexpr (USE == LAST_USE) {
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(evict_first())
                 : "memory");
    return;
  }
#endif
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Adds 16 bytes of elements, each rounded, to global memory, in the L2 cache: nothing is read. GPUs before Hopper cannot.
#if __CUDA_ARCH__ >= 900
INLINE void add_global(f16, void *p, uint4 x) {
  asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
INLINE void add_global(bf16, void *p, uint4 x) {
  asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
#endif

// An asynchronous copy of 16 bytes from global to shared memory, or of zeros if not `valid`. `copy_commit` closes a
// group of copies, `copy_wait<N>` returns when at most the N newest groups of this thread are unfinished.
template <Use USE> INLINE void copy_async(u32 to, const void *from, bool valid) {
#if __CUDA_ARCH__ >= 800
#if CCGPU_HINTS
  if constexpr (USE == LAST_USE) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0), "l"(evict_first())
                 : "memory");
    return;
  }
#endif
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  store_shared<uint4>(to, valid ? __ldcg((const uint4 *)from) : make_uint4(0, 0, 0, 0));
#endif
}
INLINE void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> INLINE void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones): lane l gives the address of row l % 8 of matrix l / 8
// and receives, of each matrix, the word l % 4 of row l / 4. Transposed: the elements of column l / 4 in rows 2 (l % 4)
// and 2 (l % 4) + 1. Stores are the reverse of loads; GPUs before Hopper have none (STORES_MATRICES).
INLINE void load_matrices(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
INLINE void load_matrices_transposed(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
#if __CUDA_ARCH__ >= 900
constexpr bool STORES_MATRICES = true;
INLINE void store_matrices(u32 row, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
#else
constexpr bool STORES_MATRICES = false;
INLINE void store_matrices(u32, const u32 (&)[4]) {}
#endif

// d (16x8) += a b on the matrix units: a 16x16 and b 16x8 of 16-bit elements, or a 16x8 and b 8x8 of tf32.
// With g = lane / 4, t = lane % 4: d holds rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2t and 2t + 1.
#if __CUDA_ARCH__ >= 800
#define CCGPU_MMA(name, type, instruction)                                                                     \
  INLINE void name(type, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {                                   \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                              \
  }
CCGPU_MMA(matrix_multiply, f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
CCGPU_MMA(matrix_multiply, bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
CCGPU_MMA(matrix_multiply, float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef CCGPU_MMA

// The nearest number with 10 bits of mantissa: a TF32 operand of the matrix units.
INLINE u32 to_tf32(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
#endif

// Two elements in a register, rounded to nearest even; the first in the low half.
INLINE u32 pack(f16, float low, float high) {
  u32 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
      : "=r"(y)
      : "f"(low), "f"(high));
#endif
  return y;
}
INLINE u32 pack(bf16, float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  const u32 l = __float_as_uint(low), h = __float_as_uint(high);
  const u32 rl = low != low ? 0x7fff : (l + 0x7fff + (l >> 16 & 1)) >> 16;
  const u32 rh = high != high ? 0x7fff : (h + 0x7fff + (h >> 16 & 1)) >> 16;
  return rl | rh << 16;
#endif
}
INLINE float2 unpack(f16, u32 x) {
  float2 y;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
}
INLINE float2 unpack(bf16, u32 x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)); }

// 2^x and log2 x: float to 2 units in the last place, with subnormals as zero; double to a unit in the last place.
INLINE float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE float logarithm2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
INLINE double power2(double x) { return exp2(x); }
INLINE double logarithm2(double x) { return log2(x); }

// x / y, to 2 units in the last place for floats: without the call of a subroutine, around which registers would be saved.
INLINE float divide(float x, float y) {
  float z;
  asm("div.full.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
INLINE double divide(double x, double y) { return x / y; }

// The smaller of x and 0; NaN for NaN.
INLINE float at_most_zero(float x) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#else
  return x > 0 ? 0 : x;
#endif
}
INLINE double at_most_zero(double x) { return x > 0 ? 0 : x; }

// Order among blocks. `take` returns a counter's value and adds one. `announce` adds one after everything that this
// thread has written, or seen others write, is visible to all. `wait_until` returns when a counter has reached a value;
// everything written before that is then visible to this thread.
INLINE int take(int *counter) { return atomicAdd(counter, 1); }
INLINE void announce(int *counter) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory"); }
INLINE void wait_until(const int *counter, int value) {
  for (int looks = 0;; looks++) {
    int seen;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= value)
      return;
    if (CCGPU_WAIT_LIMIT > 0 && looks >= CCGPU_WAIT_LIMIT)
      __trap();
    __nanosleep(100);
  }
}

// A number that is the same in all threads of a warp: the compiler may then keep it in the warp's own registers.
INLINE int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Hides a value's origin from the compiler, which then computes what depends on it where that is used, instead of keeping
// it in dozens of registers.
INLINE void hide(int &x) { asm volatile("" : "+r"(x)); }
INLINE void hide(u32 &x) { asm volatile("" : "+r"(x)); }
