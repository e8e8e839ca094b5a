// Fibers: each thread of a block is a stack, and one operating-system thread switches between these stacks.
//
// `resume(from, to)` continues `to` and returns when `from` is resumed again. The switch saves the registers that a
// called function must preserve. On x86-64 it is written in assembly (a few nanoseconds); elsewhere, or with
// CUDA_ON_CPU_UCONTEXT, it is swapcontext (about 100 times as slow, because of a system call for the signal mask).
#pragma once
#include <cstddef>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

struct Stack {
  static constexpr size_t BYTES = 256 << 10;
  char *bottom = nullptr;
  size_t bytes = BYTES;
#ifdef CUDA_ON_CPU_UCONTEXT
  ucontext_t context;
#else
  void *pointer = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void *fake = nullptr; // AddressSanitizer's own second stack
#endif
};

#ifndef CUDA_ON_CPU_UCONTEXT
// Pushes the address to continue at, stores the stack pointer and switches to the other stack. It is inlined, and jumps
// instead of returning, so that the processor predicts later returns correctly: that makes it several times faster.
__attribute__((always_inline)) inline void switch_stacks(void **from, void *to) {
  asm volatile("leaq -128(%%rsp), %%rsp\n\t" // a leaf function may keep values below its stack pointer
               "pushq %%rbp\n\t"
               "pushq %%rbx\n\t"
               "leaq 1f(%%rip), %%rax\n\t"
               "pushq %%rax\n\t"
               "movq %%rsp, (%0)\n\t"
               "movq %1, %%rsp\n\t"
               "popq %%rax\n\t"
               "jmp *%%rax\n"
               "1:\n\t"
               "popq %%rbx\n\t"
               "popq %%rbp\n\t"
               "leaq 128(%%rsp), %%rsp"
               : "+D"(from), "+S"(to)
               :
               : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0",
                 "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
                 "xmm13", "xmm14", "xmm15");
}
#endif

inline bool allocate(Stack &stack) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void *memory = mmap(nullptr, page + Stack::BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) // a page below that catches stack overflows
    return false;
  stack.bottom = (char *)memory + page;
  return true;
}

// Makes `stack` begin at entry() when it is first resumed, discarding its previous use. `number` shifts the stack's
// top, so that the tops of all stacks do not fall into the same cache sets.
inline void prepare(Stack &stack, void (*entry)(), int number) {
  char *top = stack.bottom + Stack::BYTES - number * 1088 % 4096;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack.bottom, Stack::BYTES);
  stack.fake = nullptr;
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.bottom;
  stack.context.uc_stack.ss_size = size_t(top - stack.bottom);
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
#else
  void **pointer = (void **)top;
  *--pointer = nullptr; // a function begins 8 bytes off a multiple of 16
  *--pointer = (void *)entry;
  stack.pointer = pointer;
#endif
}

// `leaving`: `from` will never be resumed.
inline void resume(Stack &from, Stack &to, bool leaving = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake, to.bottom, to.bytes);
#endif
  (void)leaving;
#ifdef CUDA_ON_CPU_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  switch_stacks(&from.pointer, to.pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// Must be called first on a prepared stack. Records the bounds of `main`, the operating-system thread's own stack.
inline void entered(Stack &main) {
#ifdef __SANITIZE_ADDRESS__
  const void *bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!main.bottom) {
    main.bottom = (char *)bottom;
    main.bytes = bytes;
  }
#endif
  (void)main;
}

} // namespace cuda_on_cpu
