#include "tensor_map.h"

#include <cstdio>
#include <cstring>

using namespace emulator;

namespace {

// CUtensorMapDataType: bytes, and the reduction that an add in this type is.
struct DataType {
  u16 bytes, reduce;
};
constexpr DataType DATA_TYPES[] = {
    {1, 0},
    {2, 0},
    {4, BULK_ADD_U32},
    {4, BULK_ADD_U32},
    {8, 0},
    {8, 0},
    {2, BULK_ADD_F16},
    {4, BULK_ADD_F32},
    {8, BULK_ADD_F64},
    {2, BULK_ADD_BF16},
};

char problem[256];

template <class... A>
const char *refuse(const char *format, A... values) {
  snprintf(problem, sizeof problem, format, values...);
  return problem;
}

}  // namespace

extern "C" const char *emulator_encode_tiled(void *p, int data_type, uint32_t rank, void *base,
                                             const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                                             const uint32_t *element_strides, int interleave, int swizzle,
                                             int l2_promotion, int fill) {
  (void)l2_promotion;
  TensorMap map{};
  if ((u64)p % 64) return refuse("the tensor map is not 64-byte aligned");
  if (data_type < 0 || data_type >= (int)(sizeof DATA_TYPES / sizeof DATA_TYPES[0]))
    return refuse("data type %d is not emulated", data_type);
  if (rank < 1 || rank > 5) return refuse("rank %u", rank);
  if (interleave || fill) return refuse("interleave and NaN fill are not emulated");
  if (swizzle < 0 || swizzle > 3) return refuse("swizzle %d is not emulated", swizzle);
  if ((u64)base % 16) return refuse("the base address is not 16-byte aligned");
  map.magic = TensorMap::MAGIC;
  map.base = (u8 *)base, map.rank = rank, map.swizzle = (u32)swizzle;
  map.element_bytes = DATA_TYPES[data_type].bytes, map.reduce_operation = DATA_TYPES[data_type].reduce;
  for (u32 d = 0; d < rank; d++) {
    if (dims[d] == 0 || dims[d] > 1ull << 32)
      return refuse("dimension %u has %llu elements", d, (unsigned long long)dims[d]);
    if (box[d] == 0 || box[d] > 256)
      return refuse("the box has %u elements in dimension %u, of 1 to 256", box[d], d);
    if (element_strides[d] != 1) return refuse("an element stride of %u is not emulated", element_strides[d]);
    map.dims[d] = (u32)(dims[d] - (dims[d] >> 32)), map.box[d] = box[d];
    if (!d) continue;
    map.strides[d] = strides[d - 1];
    if (strides[d - 1] % 16 || strides[d - 1] >> 40)
      return refuse("the stride of dimension %u is %llu bytes, no multiple of 16 below 2**40", d,
                    (unsigned long long)strides[d - 1]);
  }
  u32 inner = map.box[0] * map.element_bytes, span = swizzle ? 16u << swizzle : 0;
  if (inner % 16) return refuse("the box's inner dimension has %u bytes, no multiple of 16", inner);
  if (swizzle && inner > span)
    return refuse("the box's inner dimension has %u bytes, more than the swizzle's %u", inner, span);
  if (swizzle && inner != span)
    return refuse("an inner dimension of %u bytes under a %u-byte swizzle is not emulated", inner, span);
  memcpy(p, &map, sizeof map);
  return nullptr;
}
