// The descriptor by which wgmma finds an operand in shared memory: arithmetic, the same on the device and the
// CPU.
#pragma once

// How 16-byte chunks of a tile are permuted: what TMA wrote and wgmma reads must agree. A row is as wide as the
// name.
enum class Swizzle : unsigned { NONE = 0, BYTES_128 = 1, BYTES_64 = 2, BYTES_32 = 3 };

// K: neighbours in memory are neighbours along the product's sum; MN: along the output's rows or columns.
enum class Major : int { K = 0, MN = 1 };

// The bits that do not change along a loop; add (address & 0x3ffff) >> 4 for the tile's start.
//   K-major: `stride` is the distance of 8-row groups, `leading` (no swizzle only) that of 8-column groups.
//   MN-major: `leading` is the distance from one swizzle-wide chunk along M or N to the next, `stride` that of
//   groups of 8 along K; without a swizzle the roles are exchanged.
__device__ __forceinline__ constexpr unsigned long long descriptor_base(Swizzle swizzle, unsigned leading,
                                                                        unsigned stride) {
  return static_cast<unsigned long long>(leading >> 4) << 16 |
         static_cast<unsigned long long>(stride >> 4) << 32 | static_cast<unsigned long long>(swizzle) << 62;
}

__device__ __forceinline__ unsigned long long matrix_descriptor(unsigned shared, Swizzle swizzle,
                                                                unsigned leading, unsigned stride) {
  return descriptor_base(swizzle, leading, stride) | (shared & 0x3ffffu) >> 4;
}
