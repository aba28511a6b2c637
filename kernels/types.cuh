// Numbers: the 16-bit types, the way from a stored number to the Accumulator and back, and the functions that the
// Accumulator (float or double) needs. With memory.cuh and mma_*.cuh the only place where instructions have names.
#pragma once

struct Float16 {
  unsigned short bits;
};

struct Bfloat16 {
  unsigned short bits;
};

// From a stored number to float or double: always exact.
__device__ __forceinline__ double to_accumulator(double x) { return x; }
__device__ __forceinline__ float to_accumulator(float x) { return x; }

__device__ __forceinline__ float to_accumulator(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

__device__ __forceinline__ float to_accumulator(Bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

// One rounding, to nearest and ties to even; NaN stays NaN. The caller names T, the stored type.
template <typename T>
struct Rounding;

template <>
struct Rounding<double> {
  static __device__ __forceinline__ double apply(double x) { return x; }
};

template <>
struct Rounding<float> {
  static __device__ __forceinline__ float apply(float x) { return x; }
};

template <>
struct Rounding<Float16> {
  static __device__ __forceinline__ Float16 apply(float x) {
    Float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
};

// In integers, because cvt.rn.bf16.f32 asks for sm_80. The carry of a rounding runs into the exponent, which is
// right up to infinity; in a NaN it could run on into the sign, so a NaN is cut off instead and kept quiet.
template <>
struct Rounding<Bfloat16> {
  static __device__ __forceinline__ Bfloat16 apply(float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<unsigned short>((x == x ? rounded : bits | 0x400000u) >> 16)};
  }
};

template <typename T, typename Number>
__device__ __forceinline__ T from_accumulator(Number x) {
  return Rounding<T>::apply(x);
}

namespace math {

constexpr double LOG2E = 1.4426950408889634074;
constexpr double LN2 = 0.69314718055994530942;

__device__ __forceinline__ float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
__device__ __forceinline__ double fma(double a, double b, double c) { return ::fma(a, b, c); }

// 2**x within 2 ulp, results below the smallest normal number become 0; 0 at -inf, NaN at NaN.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2(double x) { return ::exp2(x); }

// 1 / x within 1 ulp; 0 at infinity, infinity at 0 and at subnormal numbers.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// The natural logarithm.
__device__ __forceinline__ float log(float x) { return ::logf(x); }
__device__ __forceinline__ double log(double x) { return ::log(x); }

// The larger number; a NaN loses against a number.
__device__ __forceinline__ float max(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double max(double a, double b) { return ::fmax(a, b); }

// The halves of a double's bits.
__device__ __forceinline__ unsigned high_word(double x) { return static_cast<unsigned>(__double2hiint(x)); }
__device__ __forceinline__ unsigned low_word(double x) { return static_cast<unsigned>(__double2loint(x)); }
__device__ __forceinline__ double from_words(unsigned high, unsigned low) {
  return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}

template <typename Number>
__device__ __forceinline__ Number infinity() {
  return __int_as_float(0x7f800000);
}

// The smallest normal number.
template <typename Number>
__device__ __forceinline__ Number smallest();
template <>
__device__ __forceinline__ float smallest<float>() {
  return 1.17549435e-38f;
}
template <>
__device__ __forceinline__ double smallest<double>() {
  return 2.2250738585072014e-308;
}

}  // namespace math
