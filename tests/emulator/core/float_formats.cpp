// 16-bit floats by hand, since not every compiler that builds this has them. Round to nearest, ties to even.
#include <cstring>

#include "interface.h"

namespace emulator {

namespace {
uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
}  // namespace

uint16_t to_float16(float value) {
  uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return 0x7fff;                      // the device's canonical NaN
  if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to infinity
  if (bits < 0x38800000) {                                   // a subnormal: let the float adder round it
    uint32_t sum = bits_of(float_of(bits) + 0.5f);
    return (uint16_t)(sign | (sum - 0x3f000000));
  }
  return (uint16_t)(sign | (bits + 0xc8000fff + (bits >> 13 & 1)) >> 13);
}

float from_float16(uint16_t h) {
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  if ((h & 0x7c00) == 0x7c00) return float_of(bits | 0x7f800000 | sign);
  return float_of(bits_of(float_of(bits) * 0x1p112f) | sign);
}

uint16_t to_bfloat16(float value) {
  uint32_t bits = bits_of(value);
  if (value != value) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

}  // namespace emulator
