// A launch: takes the request from Python, runs the blocks one after another, and returns counts or an error message.
#pragma once
#include <mutex>

#include "intrinsics.h"
#include "machine.h"
#include "memory.h"
#include "races.h"
#include "traffic.h"

namespace cuda_on_cpu {

struct Request { // mirrored by _Request in device.py
  u32 grid[3], block[3];
  u64 shared_bytes;
  u32 thread_order, block_order; // Order
  u64 thread_seed, block_seed;
  u32 count, check_races;
  const Buffer *buffers;
  u64 number_of_buffers;
  const void *arguments;
  u64 argument_bytes;
};

inline u64 spread(u64 seed) { // splitmix64; xorshift must not start at zero
  seed += 0x9e3779b97f4a7c15;
  seed = (seed ^ seed >> 30) * 0xbf58476d1ce4e5b9;
  seed = (seed ^ seed >> 27) * 0x94d049bb133111eb;
  return (seed ^ seed >> 31) | 1;
}

inline std::vector<u64> order_of_blocks(const Request &request, u64 blocks) {
  std::vector<u64> order(blocks);
  for (u64 i = 0; i < blocks; i++)
    order[i] = request.block_order == REVERSE ? blocks - 1 - i : i;
  if (request.block_order == RANDOM) {
    machine.random = spread(request.block_seed);
    for (u64 i = blocks; i > 1; i--)
      std::swap(order[i - 1], order[next_random() % i]);
  }
  return order;
}

inline void prepare_races(const Request &request) {
  races.checked = request.check_races;
  races.files.clear();
  races.announcements.clear();
  races.acquisitions.clear();
  races.blocks.clear();
  races.buffers.assign(request.number_of_buffers, nullptr);
  races.shared.clear();
  if (!races.checked)
    return;
  races.shared.resize(request.shared_bytes / 4 + 1);
  for (size_t i = 0; i < request.number_of_buffers; i++)
    if (request.buffers[i].writable)
      races.buffers[i] = (Word *)calloc(request.buffers[i].bytes / 4 + 1, sizeof(Word));
}

inline bool run_blocks(const Request &request) {
  const uint3 grid = gridDim;
  const std::vector<u64> order = order_of_blocks(request, u64(grid.x) * grid.y * grid.z);
  machine.order = Order(request.thread_order);
  machine.random = spread(request.thread_seed);
  for (u64 block : order) {
    blockIdx = {u32(block % grid.x), u32(block / grid.x % grid.y), u32(block / grid.x / grid.y)};
    if (races.checked)
      races.blocks.push_back({machine.epoch + 1, races.announcements.size(), races.acquisitions.size(), blockIdx});
    clear_shared_memory();
    if (!run_block())
      return false;
    check_guards();
    if (machine.failed)
      return false;
  }
  return true;
}

inline bool valid(const Request &request, size_t argument_bytes) {
  const u64 threads = u64(request.block[0]) * request.block[1] * request.block[2];
  if (request.argument_bytes != argument_bytes)
    fail_block("the kernel takes %zu bytes of arguments, got %zu", argument_bytes, size_t(request.argument_bytes));
  else if (threads < 1 || threads > 1024)
    fail_block("a block has 1 ... 1024 threads, got %llu", (unsigned long long)threads);
  else if (request.shared_bytes > Memory::LARGEST)
    fail_block("a block has at most %zu bytes of shared memory, got %zu", Memory::LARGEST,
               size_t(request.shared_bytes));
  return !machine.failed;
}

static std::mutex one_at_a_time; // the machine is a single global, and Python may launch from several threads

// Returns true, or false with the reason in `message`.
template <class Arguments>
bool launch(void (*kernel)(Arguments), const Request &request, Counts *counts, char *message, size_t room) {
  static void (*entry)(Arguments);
  static Arguments *arguments;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.failed = false;
  machine.epoch = 0;
  machine.main = {};
  blockIdx = {0, 0, 0};
  blockDim = {request.block[0], request.block[1], request.block[2]};
  gridDim = {request.grid[0], request.grid[1], request.grid[2]};
  memory.buffers = request.buffers;
  memory.number = int(request.number_of_buffers);
  traffic.counts = {};
  traffic.detailed = request.count;
  traffic.logs.assign(32, {});
  after_collective = request.count ? count_log : nullptr;
  if (valid(request, sizeof(Arguments))) {
    Arguments copy;
    memcpy(&copy, request.arguments, sizeof copy);
    entry = kernel;
    arguments = &copy;
    machine.body = [] { entry(*arguments); };
    prepare_shared_memory(request.shared_bytes);
    prepare_races(request);
    run_blocks(request);
    for (Word *words : races.buffers)
      free(words);
  }
  *counts = traffic.counts;
  snprintf(message, room, "%s", machine.failed ? machine.message : "");
  return !machine.failed;
}

} // namespace cuda_on_cpu

// Makes a kernel callable from Python.
#define CUDA_ON_CPU_ENTRY(kernel)                                                                             \
  extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_launch_##kernel(                          \
      const cuda_on_cpu::Request *request, cuda_on_cpu::Counts *counts, char *message, size_t room) {         \
    return cuda_on_cpu::launch(kernel, *request, counts, message, room);                                      \
  }
