// kernels/types.cuh for a run on the CPU: the same names, with g++'s arithmetic and the emulator's float
// formats.
#pragma once

struct Float16 {
  unsigned short bits;
};

struct Bfloat16 {
  unsigned short bits;
};

__device__ __forceinline__ double to_accumulator(double x) { return x; }
__device__ __forceinline__ float to_accumulator(float x) { return x; }
__device__ __forceinline__ float to_accumulator(Float16 x) { return emulator::from_float16(x.bits); }
__device__ __forceinline__ float to_accumulator(Bfloat16 x) { return emulator::from_bfloat16(x.bits); }

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
  static __device__ __forceinline__ Float16 apply(float x) { return {emulator::to_float16(x)}; }
};

template <>
struct Rounding<Bfloat16> {
  static __device__ __forceinline__ Bfloat16
  apply(float x) {  // the device does it in integers too; a NaN keeps its sign
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

// As rcp.approx.ftz, whose last bit is its own.
__device__ __forceinline__ float reciprocal(float x) { return 1 / x; }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

// As ex2.approx.ftz: subnormal arguments and results are 0.
__device__ __forceinline__ float exp2(float x) {
  const float y = ::exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
__device__ __forceinline__ double exp2(double x) { return ::exp2(x); }

__device__ __forceinline__ float log(float x) { return ::logf(x); }
__device__ __forceinline__ double log(double x) { return ::log(x); }

__device__ __forceinline__ float max(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double max(double a, double b) { return ::fmax(a, b); }

__device__ __forceinline__ unsigned high_word(double x) {
  return static_cast<unsigned>(static_cast<unsigned long long>(__double_as_longlong(x)) >> 32);
}
__device__ __forceinline__ unsigned low_word(double x) { return static_cast<unsigned>(__double_as_longlong(x)); }
__device__ __forceinline__ double from_words(unsigned high, unsigned low) {
  return __longlong_as_double(static_cast<long long>(static_cast<unsigned long long>(high) << 32 | low));
}

template <typename Number>
__device__ __forceinline__ Number infinity() {
  return __int_as_float(0x7f800000);
}

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
