// The parts of CUDA C++ that the kernels use, for a C++17 compiler: keywords, vector types, bit casts, min and max.
#pragma once
#include <cstdint>
#include <cstring>
#include <math.h>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
// For functions of the machine itself: they are called in so many places that inlining them would cost compile time.
#define OUT_OF_LINE __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Rejected: a static array would keep its values from block to block, which hides a missing barrier.
#define __shared__ STATIC_SHARED_MEMORY_IS_NOT_MODELLED_TAKE_IT_FROM_shared_memory
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

// NVRTC does not define these, so the kernels must not use them.
#undef INFINITY
#undef NAN

#define CUDA_ON_CPU_VECTORS(type, name, align2, align4)  \
  struct alignas(align2) name##2 { type x, y; };         \
  struct name##3 { type x, y, z; };                      \
  struct alignas(align4) name##4 { type x, y, z, w; };   \
  constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }                                \
  constexpr name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                     \
  constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
#undef CUDA_ON_CPU_VECTORS
struct alignas(16) double2 {
  double x, y;
};
constexpr double2 make_double2(double x, double y) { return {x, y}; }
using dim3 = uint3;

namespace cuda_on_cpu {
template <class To, class From> To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: both types must have one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
} // namespace cuda_on_cpu

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bit_cast<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bit_cast<float>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bit_cast<long long>(x); }

// CUDA's min and max take mixed types, and of a number and a NaN they return the number.
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>)
    return C(a) < C(b) || C(b) != C(b) ? C(a) : C(b);
  else
    return C(a) < C(b) ? C(a) : C(b);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>)
    return C(a) > C(b) || C(b) != C(b) ? C(a) : C(b);
  else
    return C(a) > C(b) ? C(a) : C(b);
}
