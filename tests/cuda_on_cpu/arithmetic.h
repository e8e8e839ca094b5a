// Models of the GPU's number formats and matrix instructions, computed with ordinary floats.
#pragma once
#include "machine.h"
#include "traffic.h"

namespace cuda_on_cpu {

// ---- float16 and bfloat16, from and to float; the bits of one element in the low half of a word

inline float widen_f16(u32 bits) {
  const u32 sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127; a subnormal becomes an ordinary number of the same value.
  const u32 finite = bit_cast<u32>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(sign | ((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite));
}

inline float widen_bf16(u32 bits) { return bit_cast<float>(bits << 16); }

inline u32 narrow_f16(float x) {
  const u32 bits = bit_cast<u32>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000)
    return 0x7fff; // NaN
  if (magnitude >= bit_cast<u32>(65520.0f))
    return sign | 0x7c00; // halfway between the largest number and the next power of two: infinity
  if (magnitude < bit_cast<u32>(0x1p-14f)) // subnormal: 0.5 has the same unit in the last place, 2^-24
    return sign | (bit_cast<u32>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<u32>(0.5f));
  return sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline u32 narrow_bf16(float x) {
  const u32 bits = bit_cast<u32>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// cvt.rna.tf32.f32: the nearest of the numbers with 10 bits of mantissa, ties away from zero.
inline u32 round_tf32(float x) { return x != x ? 0x7fffffff : (bit_cast<u32>(x) + 0x1000) & 0xffffe000; }

// The value that the matrix units read from a tf32 operand: they ignore its low 13 bits.
inline float widen_tf32(u32 bits) { return bit_cast<float>(bits & 0xffffe000); }

// ex2.approx.ftz: a subnormal argument counts as zero, a subnormal result becomes zero.
inline float exp2_flushed(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

// ---- mma.sync: d (16x8) += a (16xK) b (Kx8), fragments as in the PTX ISA ("Matrix Fragments for mma.m16n8k16 with
// floating point type" and "... mma.m16n8k8"). With g = lane / 4 and t = lane % 4 a lane holds
//   of d: rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2t and 2t + 1;
//   of a, 16-bit: a[0] row g, a[1] row g + 8, columns 2t and 2t + 1; a[2] and a[3] the same 8 columns further;
//   of b, 16-bit: column g, b[0] rows 2t and 2t + 1, b[1] 8 rows further;
//   of a, tf32: a[0] row g, a[1] row g + 8, column t; a[2] and a[3] the same 4 columns further;
//   of b, tf32: column g, b[0] row t, b[1] row t + 4.
// Products are exact in float; they are added in float, one after another.

struct MatrixOperands {
  u32 a[4], b[2];
  float d[4];
};

template <int K> struct Matrices {
  float a[16][K], b[K][8], d[16][8];
};

template <int K> void multiply_matrices(Matrices<K> &m) {
  for (int row = 0; row < 16; row++) {
    float sum[8];
    memcpy(sum, m.d[row], sizeof sum);
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++)
        sum[column] += m.a[row][k] * m.b[k][column];
    memcpy(m.d[row], sum, sizeof sum);
  }
}

template <int K, class Gather> void multiply_fragments(void **arguments, Gather gather) {
  Matrices<K> m;
  for (int lane = 0; lane < 32; lane++) {
    const MatrixOperands &own = *(const MatrixOperands *)arguments[lane];
    const int g = lane / 4, t = lane % 4;
    gather(m, own, g, t);
    memcpy(&m.d[g][2 * t], &own.d[0], 8);
    memcpy(&m.d[g + 8][2 * t], &own.d[2], 8);
  }
  multiply_matrices(m);
  for (int lane = 0; lane < 32; lane++) {
    MatrixOperands &own = *(MatrixOperands *)arguments[lane];
    const int g = lane / 4, t = lane % 4;
    memcpy(&own.d[0], &m.d[g][2 * t], 8);
    memcpy(&own.d[2], &m.d[g + 8][2 * t], 8);
  }
}

template <float (*WIDEN)(u32)> void multiply_16_bit(void **arguments, u32, Place) {
  multiply_fragments<16>(arguments, [](Matrices<16> &m, const MatrixOperands &own, int g, int t) {
    for (int half = 0; half < 2; half++) // of a register: the low one is the first element
      for (int step = 0; step < 2; step++) { // of 8 columns of a, of 8 rows of b
        const int k = 2 * t + half + 8 * step, shift = 16 * half;
        m.a[g][k] = WIDEN(own.a[2 * step] >> shift & 0xffff);
        m.a[g + 8][k] = WIDEN(own.a[2 * step + 1] >> shift & 0xffff);
        m.b[k][g] = WIDEN(own.b[step] >> shift & 0xffff);
      }
  });
}

inline void multiply_tf32(void **arguments, u32, Place) {
  multiply_fragments<8>(arguments, [](Matrices<8> &m, const MatrixOperands &own, int g, int t) {
    for (int step = 0; step < 2; step++) {
      const int k = t + 4 * step;
      m.a[g][k] = widen_tf32(own.a[2 * step]);
      m.a[g + 8][k] = widen_tf32(own.a[2 * step + 1]);
      m.b[k][g] = widen_tf32(own.b[step]);
    }
  });
}

template <Compute MULTIPLY> void count_multiply(void **arguments, u32 lanes, Place place) {
  traffic.counts.matrix_multiplies++;
  MULTIPLY(arguments, lanes, place);
}

} // namespace cuda_on_cpu
