// Kernels with one mistake each, and a correct variant of some. All are launched with two blocks of 64 threads, 2048
// bytes of shared memory, `in` and `out` of 1024 bytes each, 16-byte aligned, and counters at 0.
#include "primitives.cuh"

struct Arguments {
  char *in; // registered as read-only
  char *out;
  int *counters;
};

#define KERNEL(name) extern "C" __global__ void name(const __grid_constant__ Arguments a)

INLINE u32 shared(int offset) { return shared_address(shared_memory()) + offset; }
INLINE u32 word(int i) { return shared(4 * i); }
INLINE u32 unit(int i) { return shared(16 * i); }
INLINE int thread() { return threadIdx.x; }
INLINE void put(const Arguments &a, float x) { store_global(a.out + 4 * (blockIdx.x * blockDim.x + thread()), x); }

// ---- races in shared memory
KERNEL(barrier_kept) {
  store_shared(word(thread()), 1.0f);
  __syncthreads();
  put(a, load_shared<float>(word(63 - thread())));
}
KERNEL(barrier_removed) {
  store_shared(word(thread()), 1.0f);
  put(a, load_shared<float>(word(63 - thread())));
}
KERNEL(second_barrier_removed) { // the next round overwrites words that other threads still read
  for (int round = 0; round < 2; round++) {
    store_shared(word(thread()), 1.0f);
    __syncthreads();
    put(a, load_shared<float>(word(63 - thread())));
  }
}
KERNEL(read_by_many_then_written) {
  if (thread() == 0)
    store_shared(word(0), 1.0f);
  __syncthreads();
  put(a, load_shared<float>(word(0)));
  if (thread() == 40)
    store_shared(word(0), 2.0f);
}
// Shuffles make the reads happen first without ordering memory.
INLINE void pass_time(int shuffles) {
  for (int i = 0; i < shuffles; i++)
    __shfl_xor_sync(~0u, 1.0f, 1);
}
KERNEL(written_after_one_read) {
  if (thread() == 1)
    load_shared<float>(word(0));
  pass_time(1);
  if (thread() == 0)
    store_shared(word(0), 1.0f);
}
KERNEL(written_after_reads_of_the_warp) {
  if (thread() < 32)
    load_shared<float>(word(0));
  pass_time(1);
  if (thread() == 0)
    store_shared(word(0), 1.0f);
}
KERNEL(written_after_reads_of_two_warps) {
  if (thread() >= 32)
    pass_time(20);
  load_shared<float>(word(0));
  if (thread() < 32) {
    pass_time(400);
    __syncwarp();
    if (thread() == 0)
      store_shared(word(0), 1.0f);
  }
}
KERNEL(warp_barrier_kept) {
  store_shared(word(thread()), 1.0f);
  __syncwarp();
  put(a, load_shared<float>(word(thread() ^ 1)));
  __syncwarp();
  store_shared(word(thread() ^ 2), 1.0f);
}
KERNEL(warp_barrier_across_warps) {
  if (thread() < 32)
    store_shared(word(thread()), 1.0f);
  __syncwarp();
  if (thread() >= 32)
    put(a, load_shared<float>(word(thread() ^ 32)));
}
KERNEL(warp_barrier_of_a_part) {
  if (thread() % 32 < 8) {
    store_shared(word(thread()), 1.0f);
    __syncwarp(0xffu);
  } else
    put(a, load_shared<float>(word(thread() - 8)));
}
KERNEL(shuffle_as_barrier) {
  store_shared(word(thread()), 1.0f);
  __shfl_xor_sync(~0u, 1.0f, 1);
  put(a, load_shared<float>(word(thread() ^ 1)));
}
KERNEL(matrix_load_before_barrier) {
  store_shared(unit(thread()), make_uint4(1, 2, 3, 4));
  u32 r[4];
  load_matrices(r, unit(thread() ^ 1));
}
KERNEL(one_word_two_writers) {
  store_shared(word(thread() / 2), 1.0f);
}

// ---- copies
KERNEL(copy_kept) {
  copy_async<KEEP>(unit(thread()), a.in + 16 * (thread() % 64), true);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  put(a, load_shared<float>(unit(63 - thread())));
}
KERNEL(copy_not_waited_for) {
  copy_async<KEEP>(unit(thread()), a.in + 16 * thread(), true);
  copy_commit();
  put(a, load_shared<float>(unit(thread())));
}
KERNEL(copy_wait_of_a_newer_group) {
  for (int i = 0; i < 2; i++) {
    copy_async<KEEP>(unit(2 * thread() + i), a.in + 16 * (thread() % 64), true);
    copy_commit();
  }
  copy_wait<1>();
  put(a, load_shared<float>(unit(2 * thread() + 1)));
}
KERNEL(copy_not_committed) {
  copy_async<KEEP>(unit(thread()), a.in + 16 * thread(), true);
  copy_wait<0>();
  put(a, load_shared<float>(unit(thread())));
}
KERNEL(copy_read_without_barrier) {
  copy_async<KEEP>(unit(thread()), a.in + 16 * thread(), true);
  copy_commit();
  copy_wait<0>();
  put(a, load_shared<float>(unit(63 - thread())));
}
KERNEL(copy_into_what_others_read) {
  store_shared(unit(thread()), make_uint4(0, 0, 0, 0));
  __syncthreads();
  put(a, load_shared<float>(unit(63 - thread())));
  copy_async<KEEP>(unit(thread()), a.in + 16 * thread(), true);
  copy_commit();
  __syncthreads();
  copy_wait<0>();
}

// ---- barriers and collectives
KERNEL(divergent_barrier) {
  if (thread() < 10)
    __syncthreads();
  else
    __syncthreads();
}
KERNEL(barrier_not_reached) {
  if (thread() != 17)
    __syncthreads();
}
KERNEL(barrier_after_others_left) {
  if (thread() < 8)
    return;
  __syncwarp();
  __syncthreads();
}
KERNEL(lane_missing_in_shuffle) {
  if (thread() != 7)
    __shfl_xor_sync(~0u, 1.0f, 1);
  __syncthreads();
}
KERNEL(lanes_in_different_shuffles) {
  if (thread() % 32 < 7)
    __shfl_xor_sync(~0u, 1.0f, 1);
  else
    __shfl_xor_sync(~0u, 1.0f, 2);
}
KERNEL(lane_not_in_its_mask) { __shfl_sync(0xffffu, 1.0f, 0); }
KERNEL(shuffle_from_outside_the_mask) {
  if (thread() % 32 < 16)
    __shfl_sync(0xffffu, 1.0f, 20);
}
KERNEL(shuffle_from_a_lane_that_left) {
  if (thread() % 32 == 3)
    return;
  __shfl_sync(~0u, 1.0f, 3);
}
KERNEL(multiply_with_half_a_warp) {
  if (thread() % 32 < 16)
    return;
  float d[4] = {};
  const u32 zeros[4] = {};
  matrix_multiply(bf16(), d, zeros, 0, 0);
}
KERNEL(lane_leaves_while_others_multiply) {
  if (thread() % 32 == 31)
    return;
  float d[4] = {};
  const u32 zeros[4] = {};
  matrix_multiply(bf16(), d, zeros, 0, 0);
}

// ---- addresses
KERNEL(load_beyond_shared) { put(a, load_shared<float>(word(512))); }
KERNEL(store_before_shared) { store_shared(shared(-4), 1.0f); }
KERNEL(half_beyond_shared) { put(a, load_shared<float4>(shared(2040)).x); }
KERNEL(copy_beyond_shared) { copy_async<KEEP>(unit(128), a.in, true); }
KERNEL(matrix_load_beyond_shared) {
  u32 r[4];
  load_matrices_transposed(r, unit(97 + thread() % 32));
}
KERNEL(plain_store_beyond_shared) { *(volatile float *)(shared_memory() + 2048 + 16) = 1.0f; }
KERNEL(plain_store_before_shared) { *(volatile float *)(shared_memory() - 16) = 1.0f; }
KERNEL(load_beyond_global) { put(a, load_global<float>(a.in + 1024)); }
KERNEL(load_before_global) { put(a, load_global<float>(a.in - 4)); }
KERNEL(load_of_null) { put(a, load_global<float>(nullptr)); }
KERNEL(store_beyond_global) { store_global(a.out + 1016, make_float4(0, 0, 0, 0)); }
KERNEL(copy_beyond_global) { copy_async<KEEP>(unit(thread()), a.in + 1024, true); }
KERNEL(store_to_read_only) { store_global(a.in, 1.0f); }
KERNEL(counter_in_read_only) { take((int *)a.in); }
KERNEL(misaligned_shared) { put(a, load_shared<float2>(word(1)).x); }
KERNEL(misaligned_copy) { copy_async<KEEP>(unit(1) + 8, a.in, true); }
KERNEL(misaligned_source) { copy_async<KEEP>(unit(1), a.in + 8, true); }
KERNEL(misaligned_matrix) {
  u32 r[4];
  load_matrices(r, unit(thread() % 32) + 4);
}
KERNEL(misaligned_global) { store_global(a.out + 8, make_float4(0, 0, 0, 0)); }

// ---- between blocks, and within one in global memory
KERNEL(wait_for_a_later_block) {
  if (thread() == 0) {
    wait_until(a.counters, 1 - (int)blockIdx.x);
    announce(a.counters);
  }
}
INLINE void hand_over(const Arguments &a, bool wait, bool before, bool after, bool announced) {
  if (blockIdx.x == 0) {
    store_global(a.out + 4 * thread(), 1.0f);
    if (before)
      __syncthreads();
    if (thread() == 0 && announced)
      announce(a.counters);
  } else {
    if (thread() == 0 && wait)
      wait_until(a.counters, announced);
    if (after)
      __syncthreads();
    store_global(a.out + 512 + 4 * thread(), load_global<float>(a.out + 4 * (63 - thread())));
  }
}
KERNEL(handed_over) { hand_over(a, true, true, true, true); }
KERNEL(not_waited_for) { hand_over(a, false, true, true, true); }
KERNEL(no_barrier_before_announce) { hand_over(a, true, false, true, true); }
KERNEL(no_barrier_after_wait) { hand_over(a, true, true, false, true); }
KERNEL(not_announced) { hand_over(a, true, true, true, false); }
KERNEL(waited_for_too_few) {
  if (blockIdx.x == 0) {
    if (thread() == 0)
      announce(a.counters);
    __syncthreads();
    put(a, 1.0f);
    __syncthreads();
    if (thread() == 0)
      announce(a.counters);
  } else if (thread() == 0) {
    wait_until(a.counters, 1);
    load_global<float>(a.out);
  }
}
KERNEL(two_blocks_one_element) { store_global(a.out + 4 * thread(), 1.0f); }
KERNEL(two_threads_one_element) { store_global(a.out + 512 * blockIdx.x + 4 * (thread() / 2), 1.0f); }
KERNEL(element_read_before_barrier) {
  put(a, 1.0f);
  load_global<float>(a.out + 256 * blockIdx.x + 4 * (63 - thread()));
}
