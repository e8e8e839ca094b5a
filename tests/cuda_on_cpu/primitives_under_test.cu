// A kernel for each primitive that applies it to the array `in` and writes the result to `out`, for test_primitives.py.
#include "primitives.cuh"

struct Arguments {
  const char *in;
  char *out;
  int number; // of elements, where the kernel has a choice
};

INLINE int thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }
template <class V> INLINE V input(const Arguments &a, int i) { return load_global<V>(a.in + i * sizeof(V)); }
template <class V> INLINE void output(const Arguments &a, int i, V value) {
  store_global(a.out + i * sizeof(V), value);
}

// ---- matrix multiplication: d = c + a b. The input is a (16xK), b (Kx8), c (16x8), row by row, one word an element.
// The indices are those of the PTX ISA's figures: element i of a lane's fragment.
template <class Type, int K> INLINE void multiply(const Arguments &args) {
  const int group = threadIdx.x / 4, within = threadIdx.x % 4;
  constexpr int PER_REGISTER = K / 8; // elements: two of 16 bits, one of tf32
  u32 a[4] = {}, b[2] = {};
  for (int i = 0; i < 4 * PER_REGISTER; i++) {
    const int r = i / PER_REGISTER, half = i % PER_REGISTER;
    const int row = r % 2 == 0 ? group : group + 8, column = within * PER_REGISTER + half + (r < 2 ? 0 : K / 2);
    a[r] |= input<u32>(args, row * K + column) << 16 * half;
  }
  for (int i = 0; i < 2 * PER_REGISTER; i++) {
    const int r = i / PER_REGISTER, half = i % PER_REGISTER;
    const int row = within * PER_REGISTER + half + (r == 0 ? 0 : K / 2);
    b[r] |= input<u32>(args, 16 * K + row * 8 + group) << 16 * half;
  }
  float d[4];
  for (int i = 0; i < 4; i++)
    d[i] = input<float>(args, 24 * K + (i < 2 ? group : group + 8) * 8 + within * 2 + i % 2);
  matrix_multiply(Type(), d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++)
    output(args, (i < 2 ? group : group + 8) * 8 + within * 2 + i % 2, d[i]);
}
extern "C" __global__ void multiply_f16(const __grid_constant__ Arguments a) { multiply<f16, 16>(a); }
extern "C" __global__ void multiply_bf16(const __grid_constant__ Arguments a) { multiply<bf16, 16>(a); }
extern "C" __global__ void multiply_tf32(const __grid_constant__ Arguments a) { multiply<float, 8>(a); }

// ---- matrix loads: 32 rows of 16 bytes lie in shared memory in the order 5 l mod 32, lane by lane.
template <bool TRANSPOSED> INLINE void load(const Arguments &a) {
  const int lane = threadIdx.x;
  const u32 row = shared_address(shared_memory()) + 16 * (5 * lane % 32);
  store_shared(row, input<uint4>(a, lane));
  __syncwarp();
  u32 r[4];
  if (TRANSPOSED)
    load_matrices_transposed(r, row);
  else
    load_matrices(r, row);
  output(a, lane, make_uint4(r[0], r[1], r[2], r[3]));
}
extern "C" __global__ void load_rows(const __grid_constant__ Arguments a) { load<false>(a); }
extern "C" __global__ void load_columns(const __grid_constant__ Arguments a) { load<true>(a); }

// The reverse: each lane stores its words of four matrices, and shared memory is read lane by lane.
extern "C" __global__ void store_rows(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x;
  const u32 row = shared_address(shared_memory()) + 16 * (5 * lane % 32);
  const uint4 x = input<uint4>(a, lane);
  const u32 r[4] = {x.x, x.y, x.z, x.w};
  store_matrices(row, r);
  __syncwarp();
  output(a, lane, load_shared<uint4>(row));
}

// ---- copies: three groups; after copy_wait<1> the first two have arrived, after copy_wait<0> the third. Odd lanes
// copy with `valid` false, from a null address.
extern "C" __global__ void copy(const __grid_constant__ Arguments a) {
  const u32 own = shared_address(shared_memory()) + 48 * threadIdx.x;
  const bool valid = threadIdx.x % 2 == 0;
  for (int group = 0; group < 3; group++) {
    copy_async<KEEP>(own + 16 * group, valid ? a.in + 16 * (3 * threadIdx.x + group) : nullptr, valid);
    copy_commit();
  }
  copy_wait<1>();
  for (int group = 0; group < 2; group++)
    output(a, 3 * threadIdx.x + group, load_shared<uint4>(own + 16 * group));
  copy_wait<0>();
  output(a, 3 * threadIdx.x + 2, load_shared<uint4>(own + 32));
}

// ---- number formats
template <class Type> INLINE void narrow(const Arguments &a) {
  const int i = thread_of_grid();
  if (i < a.number)
    output(a, i, pack(Type(), input<float2>(a, i).x, input<float2>(a, i).y));
}
template <class Type> INLINE void widen(const Arguments &a) {
  const int i = thread_of_grid();
  if (i < a.number)
    output(a, i, unpack(Type(), input<u32>(a, i)));
}
extern "C" __global__ void pack_f16(const __grid_constant__ Arguments a) { narrow<f16>(a); }
extern "C" __global__ void pack_bf16(const __grid_constant__ Arguments a) { narrow<bf16>(a); }
extern "C" __global__ void unpack_f16(const __grid_constant__ Arguments a) { widen<f16>(a); }
extern "C" __global__ void unpack_bf16(const __grid_constant__ Arguments a) { widen<bf16>(a); }
extern "C" __global__ void round_to_tf32(const __grid_constant__ Arguments a) {
  const int i = thread_of_grid();
  if (i < a.number)
    output(a, i, to_tf32(input<float>(a, i)));
}
template <class T> INLINE void powers(const Arguments &a) {
  const int i = thread_of_grid();
  if (i >= a.number)
    return;
  output(a, 2 * i, power2(input<T>(a, i)));
  output(a, 2 * i + 1, logarithm2(input<T>(a, i)));
}
template <class T> INLINE void quotients(const Arguments &a) { // of neighbours, and each number or 0
  const int i = thread_of_grid();
  if (i >= a.number)
    return;
  output(a, 2 * i, divide(input<T>(a, i), input<T>(a, (i + 1) % a.number)));
  output(a, 2 * i + 1, at_most_zero(input<T>(a, i)));
}
extern "C" __global__ void quotients_float(const __grid_constant__ Arguments a) { quotients<float>(a); }
extern "C" __global__ void quotients_double(const __grid_constant__ Arguments a) { quotients<double>(a); }
extern "C" __global__ void powers_float(const __grid_constant__ Arguments a) { powers<float>(a); }
extern "C" __global__ void powers_double(const __grid_constant__ Arguments a) { powers<double>(a); }

// ---- the machine
extern "C" __global__ void indices(const __grid_constant__ Arguments a) {
  const uint3 t = threadIdx, b = blockIdx, n = blockDim, m = gridDim;
  const int thread = (t.z * n.y + t.y) * n.x + t.x, block = (b.z * m.y + b.y) * m.x + b.x;
  const int three_of_thread = t.x + 10 * t.y + 100 * t.z, three_of_block = b.x + 10 * b.y + 100 * b.z;
  output(a, block * n.x * n.y * n.z + thread, make_int4(three_of_thread, three_of_block, block, thread));
}

// Writes the turn in which each thread ran before and after a barrier. The first word of `out` counts the turns.
extern "C" __global__ void turns(const __grid_constant__ Arguments a) {
  int *counter = (int *)a.out;
  const int first = take(counter);
  __syncthreads();
  const int second = take(counter);
  store_global(counter + 1 + 2 * thread_of_grid(), first);
  store_global(counter + 2 + 2 * thread_of_grid(), second);
}

// Sums a block's numbers: shuffles within the warps, shared memory between them.
extern "C" __global__ void sum_block(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float sum = input<float>(a, thread_of_grid());
  for (int bits = 16; bits > 0; bits /= 2)
    sum += __shfl_xor_sync(~0u, sum, bits);
  if (lane == 0)
    store_shared(shared_address(shared_memory()) + 4 * warp, sum);
  __syncthreads();
  float all = 0;
  for (int w = 0; w < warps; w++)
    all += load_shared<float>(shared_address(shared_memory()) + 4 * w);
  output(a, thread_of_grid(), all);
}

// Quarter warps shuffle separately, each with its own mask and width; the last warp may be incomplete.
extern "C" __global__ void shuffles(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x % 32, quarter = lane / 8;
  const u32 mask = 0xffu << 8 * quarter;
  const double value = input<double>(a, threadIdx.x);
  double result;
  if (quarter % 2 == 0)
    result = __shfl_sync(mask, value, quarter + 1, 8);
  else
    result = __shfl_xor_sync(mask, value, 3, 8);
  __syncwarp();
  output(a, threadIdx.x, result);
}

// Block b announces; block b + 1 waits for it and adds to the number that it wrote. `out` holds a counter and, from
// byte 16 on, one float.
extern "C" __global__ void chain(const __grid_constant__ Arguments a) {
  int *counter = (int *)a.out;
  if (threadIdx.x == 0)
    wait_until(counter, blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 5)
    output(a, 4, load_global<float>(a.out + 16) + 1.0f);
  __syncthreads();
  if (threadIdx.x == 0)
    announce(counter);
}

// Writes out the first word of shared memory as the block finds it, and then another value there for the next block.
extern "C" __global__ void uninitialised(const __grid_constant__ Arguments a) {
  output(a, blockIdx.x, load_shared<float>(shared_address(shared_memory())));
  store_shared(shared_address(shared_memory()), 1.0f);
}

// The number that lane 0 holds, in all lanes of a warp.
extern "C" __global__ void uniform_numbers(const __grid_constant__ Arguments a) {
  output(a, threadIdx.x, uniform(input<int>(a, threadIdx.x)));
}

extern "C" __global__ void hidden(const __grid_constant__ Arguments a) {
  int x = 7;
  u32 y = 8;
  hide(x);
  hide(y);
  output(a, 0, make_int2(x, y));
}
