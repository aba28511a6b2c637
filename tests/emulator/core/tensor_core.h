// Matrix products on fragments: which lane holds which element, and how sums are rounded.
#pragma once
#include "state.h"

namespace emulator {

float element_of(u16 bits, Format format);  // FLOAT16 or BFLOAT16

// d (m, n) = c + a (m, k) b (k, n), all row-major, with an H200's bits. Products are exact. Of all k + 1 addends, what
// lies below 2^-25 of the power of 2 that the largest one begins with is cut off, and the sum is cut off to float32.
// That power of a product is the product of its factors' powers: 1.5 * 1.5 begins with 1.
void multiply(u32 m, u32 n, u32 k, const float *a, const float *b, const float *c, float *d);

// Where the elements of a 16-bit A operand (16 rows, 16 columns) in four registers lie.
void unpack_a(u32 lane, const u32 *registers, Format format, float *a, u32 columns);

}  // namespace emulator
