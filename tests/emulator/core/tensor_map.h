// The tensor map of TMA, as this emulator encodes it: 128 bytes like the hardware's, with a content of its own.
#pragma once
#include "state.h"

namespace emulator {

struct alignas(64) TensorMap {
  static constexpr u64 MAGIC = 0x70616d5f74656e73ull;
  u64 magic;
  u8 *base;
  u32 dims[5];
  u32 rank;
  u32 box[5];
  u32 swizzle;     // 0 none, 1 32 bytes, 2 64 bytes, 3 128 bytes: CUtensorMapSwizzle
  u64 strides[5];  // in bytes; [0] unused
  u16 element_bytes, reduce_operation;

  u32 box_bytes() const {
    u32 bytes = element_bytes;
    for (u32 d = 0; d < rank; d++) bytes *= box[d];
    return bytes;
  }
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");

// Bits 4.. of an address are xor-ed with bits 7..: chunk c of 128-byte line r lies at chunk c ^ (r % 8), or %
// 4, % 2.
inline u32 swizzled(u32 address, u32 swizzle) {
  u32 bits = swizzle == 3 ? 0x70 : swizzle == 2 ? 0x30 : swizzle == 1 ? 0x10 : 0;
  return address ^ (address >> 3 & bits);
}

// Bytes after which the pattern repeats: what a tile's start must be aligned to.
inline u32 swizzle_pattern(u32 swizzle) {
  return swizzle == 3 ? 1024 : swizzle == 2 ? 512 : swizzle == 1 ? 256 : 128;
}

}  // namespace emulator

// cuTensorMapEncodeTiled, argument for argument; 0, or a text that says what is wrong.
extern "C" const char *emulator_encode_tiled(void *map, int data_type, uint32_t rank, void *base,
                                             const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                                             const uint32_t *element_strides, int interleave, int swizzle,
                                             int l2_promotion, int fill);
