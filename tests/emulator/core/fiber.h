// Fibers: one stack each, switched by hand. A CUDA thread of the emulator is a fiber.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

// A stack with an unmapped page below it, kept for the next block that needs one.
struct Stack {
  uint8_t *base = nullptr;
  static constexpr size_t BYTES = 256 * 1024;

  void allocate();  // once; later calls keep the stack
  bool contains(uint64_t address) const { return address - (uint64_t)base < BYTES; }
};

// The saved stack pointer of a fiber that does not run.
using Context = void *;

// A context that enters `entry` on `stack` when first switched to; `entry` must never return.
Context new_context(const Stack &stack, void (*entry)());

}  // namespace emulator

// Saves the running fiber in *save and continues `next`.
extern "C" void emulator_switch(emulator::Context *save, emulator::Context next);
