// How a fault becomes one message with kernel file and line on both sides.
#pragma once
#include <string>

#include "state.h"

namespace emulator {

// Ends the launch. The message gets the running thread and its place in the kernel behind it.
[[noreturn]] void fail(const char *kind, const char *format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail_deadlock();

std::string place(const void *pc);              // "kernels/x.cu:12 (from kernels/y.cu:40)"
std::string place_of(u32 pc);                   // of a cell's record
u32 short_pc(const void *pc);                   // a cell's record of it: the offset in the kernel's library
std::string who(const Block &block, u32 slot);  // "thread 37 (warp 1, lane 5)"
std::string who_in(u32 block, u32 slot);        // the same, with the block where it isn't the running one
std::string coordinates(u32 block);             // "(1, 0, 0)"
bool same_line(const void *a, const void *b);

}  // namespace emulator

// Keeps the caller's place in the kernel. At the top of every function that kernels call.
#define EMULATOR_ENTER() (self->pc = __builtin_return_address(0))
