// Functions of numbers that score and mask functions may call, for float and double; and integers as NumPy has them.
// In float the errors are those of CUDA's own functions: exp, tanh, sin, cos and exp2 within 2 ulp, log within 1, sqrt,
// floor and fmod exact; in double within 2 ulp all of them. Subnormal floats count as 0.
#pragma once
#include "types.cuh"

namespace math {

__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ double exp(double x) { return ::exp(x); }
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
__device__ __forceinline__ double tanh(double x) { return ::tanh(x); }
__device__ __forceinline__ float sqrt(float x) { return ::sqrtf(x); }
__device__ __forceinline__ double sqrt(double x) { return ::sqrt(x); }
__device__ __forceinline__ float sin(float x) { return ::sinf(x); }
__device__ __forceinline__ double sin(double x) { return ::sin(x); }
__device__ __forceinline__ float cos(float x) { return ::cosf(x); }
__device__ __forceinline__ double cos(double x) { return ::cos(x); }
__device__ __forceinline__ float floor(float x) { return ::floorf(x); }
__device__ __forceinline__ double floor(double x) { return ::floor(x); }
__device__ __forceinline__ float absolute(float x) { return ::fabsf(x); }
__device__ __forceinline__ double absolute(double x) { return ::fabs(x); }
__device__ __forceinline__ float fmod(float x, float y) { return ::fmodf(x, y); }
__device__ __forceinline__ double fmod(double x, double y) { return ::fmod(x, y); }
__device__ __forceinline__ float rint(float x) { return ::rintf(x); }
__device__ __forceinline__ double rint(double x) { return ::rint(x); }
__device__ __forceinline__ float copysign(float x, float y) { return ::copysignf(x, y); }
__device__ __forceinline__ double copysign(double x, double y) { return ::copysign(x, y); }

__device__ __forceinline__ float value(float x) { return x; }
__device__ __forceinline__ double value(double x) { return x; }

// A double literal as a Number, beyond whose range it is infinite.
template <typename Number>
__device__ __forceinline__ Number constant(double x) {
  return static_cast<Number>(x);
}

template <typename Number>
__device__ __forceinline__ Number not_a_number() {
  return __int_as_float(0x7fffffff);
}

// A NaN on either side is the result; of equals the first one.
template <typename Number>
__device__ __forceinline__ Number minimum(Number x, Number y) {
  return value(x) <= value(y) || value(x) != value(x) ? x : y;
}
template <typename Number>
__device__ __forceinline__ Number maximum(Number x, Number y) {
  return value(x) >= value(y) || value(x) != value(x) ? x : y;
}

// x - y * floor(x / y), which has the sign of y. The remainder that fmod leaves is exact.
template <typename Number>
__device__ __forceinline__ Number remainder(Number x, Number y) {
  const Number rest = fmod(x, y);
  if (rest == 0) return copysign(rest, y);
  return (rest < 0) != (y < 0) ? rest + y : rest;
}

// floor(x / y), not spoilt by the rounding of the quotient: without its remainder, x is a multiple of y.
template <typename Number>
__device__ __forceinline__ Number floor_divide(Number x, Number y) {
  if (y == 0) return x / y;
  const Number rest = fmod(x, y);
  const Number whole = (x - rest) / y;
  return rest != 0 && (rest < 0) != (y < 0) ? rint(whole - Number(1)) : rint(whole);
}

}  // namespace math

// Integer arithmetic that wraps, in unsigned numbers, where C++ leaves an overflow open; division rounds down.
namespace integer {

template <typename Int>
struct Unsigned;
template <>
struct Unsigned<int> {
  using Type = unsigned;
};
template <>
struct Unsigned<long long> {
  using Type = unsigned long long;
};
template <typename Int>
using Bits = typename Unsigned<Int>::Type;

template <typename Int>
__device__ __forceinline__ Int add(Int x, Int y) {
  return static_cast<Int>(Bits<Int>(x) + Bits<Int>(y));
}
template <typename Int>
__device__ __forceinline__ Int subtract(Int x, Int y) {
  return static_cast<Int>(Bits<Int>(x) - Bits<Int>(y));
}
template <typename Int>
__device__ __forceinline__ Int multiply(Int x, Int y) {
  return static_cast<Int>(Bits<Int>(x) * Bits<Int>(y));
}
template <typename Int>
__device__ __forceinline__ Int negative(Int x) {
  return static_cast<Int>(Bits<Int>(0) - Bits<Int>(x));
}
template <typename Int>
__device__ __forceinline__ Int absolute(Int x) {
  return x < 0 ? negative(x) : x;
}
template <typename Int>
__device__ __forceinline__ Int minimum(Int x, Int y) {
  return x < y ? x : y;
}
template <typename Int>
__device__ __forceinline__ Int maximum(Int x, Int y) {
  return x > y ? x : y;
}

// 0 where y is 0. The quotient by -1 may overflow and is a negation.
template <typename Int>
__device__ __forceinline__ Int floor_divide(Int x, Int y) {
  if (y == 0) return 0;
  if (y == -1) return negative(x);
  return x / y - Int(x % y != 0 && (x < 0) != (y < 0));
}
template <typename Int>
__device__ __forceinline__ Int remainder(Int x, Int y) {
  if (y == 0 || y == -1) return 0;
  const Int rest = x % y;
  return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest;
}

}  // namespace integer
