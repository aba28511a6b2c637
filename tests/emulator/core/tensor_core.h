// Matrix products on fragments: which lane holds which element, and how sums are rounded.
#pragma once
#include "state.h"

namespace emulator {

float element_of(u16 bits, Format format);  // FLOAT16 or BFLOAT16

// d (m, n) = c + a (m, k) b (k, n), all row-major. Products are exact and a sum is rounded once, which is at
// least as exact as the hardware: see docs/emulator.md.
void multiply(u32 m, u32 n, u32 k, const float *a, const float *b, const float *c, float *d);

// Where the elements of a 16-bit A operand (16 rows, 16 columns) in four registers lie.
void unpack_a(u32 lane, const u32 *registers, Format format, float *a, u32 columns);

}  // namespace emulator
