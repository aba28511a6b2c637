#include "fiber.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

// Only callee-saved registers travel: to the compiler a switch is an ordinary call.
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emulator_switch, . - emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, %function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch, . - emulator_switch
)");
#else
#error "the emulator switches fibers on x86-64 and aarch64 only"
#endif

namespace emulator {

void Stack::allocate() {
  if (base) return;
  constexpr size_t GUARD = 64 * 1024;  // a multiple of every page size in use
  void *p =
      mmap(nullptr, BYTES + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, GUARD, PROT_NONE)) {
    perror("emulator: no memory for a fiber's stack");
    abort();
  }
  base = (uint8_t *)p + GUARD;
}

Context new_context(const Stack &stack, void (*entry)()) {
  uint64_t *top = (uint64_t *)(stack.base + Stack::BYTES - 16);
#if defined(__x86_64__)
  *--top = 0;                // where `entry` would return to
  *--top = (uint64_t)entry;  // popped by ret
  for (int i = 0; i < 6; i++) *--top = 0;
#else
  top -= 20;
  memset(top, 0, 160);
  top[11] = (uint64_t)entry;  // x30
#endif
  return top;
}

}  // namespace emulator
